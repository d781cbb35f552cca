use minicbor::{Decode, Decoder, Encode};

use super::VirtioError;

/// Encodes a device's `saved` type.
pub(super) fn encode<T: Encode<()>>(saved: &T) -> Vec<u8> {
    let mut out = Vec::new();
    // Writing to a Vec cannot fail, and the `saved` types have no encoders that do.
    let _ = minicbor::encode(saved, &mut out);
    out
}

/// Decodes all of `bytes`.
pub(super) fn decode<'b, T: Decode<'b, ()>>(device: &'static str, bytes: &'b [u8]) -> Result<T, VirtioError> {
    let bad = |why: String| VirtioError::BadState { device, why };
    let mut decoder = Decoder::new(bytes);
    let saved = decoder.decode().map_err(|e| bad(e.to_string()))?;
    if decoder.position() != bytes.len() {
        return Err(bad("data is left over".into()));
    }
    Ok(saved)
}
