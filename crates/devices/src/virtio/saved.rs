use minicbor::Decode;

pub(super) use crate::saved::encode;

use super::VirtioError;

/// Decodes all of `bytes`.
pub(super) fn decode<T: for<'b> Decode<'b, ()>>(device: &'static str, bytes: &[u8]) -> Result<T, VirtioError> {
    crate::saved::decode(device, bytes).map_err(|bad| VirtioError::BadState { device: bad.device, why: bad.why })
}
