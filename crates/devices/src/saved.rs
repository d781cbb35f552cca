use minicbor::{Decode, Decoder, Encode};

/// A saved state that does not belong to the device it is given to, or is damaged.
#[derive(Debug, thiserror::Error)]
#[error("the saved state of the {device} does not fit: {why}")]
pub struct BadState {
    pub device: &'static str,
    pub why: String,
}

impl BadState {
    pub fn new(device: &'static str, why: impl Into<String>) -> Self {
        Self { device, why: why.into() }
    }
}

pub fn encode<T: Encode<()>>(saved: &T) -> Vec<u8> {
    let mut out = Vec::new();
    // Writing to a vector cannot fail, and no `Encode` of ours does.
    let Ok(()) = minicbor::encode(saved, &mut out) else { return Vec::new() };
    out
}

/// Decodes all of `bytes`; what is left over is an error, since it would be lost.
pub fn decode<T: for<'b> Decode<'b, ()>>(device: &'static str, bytes: &[u8]) -> Result<T, BadState> {
    let mut decoder = Decoder::new(bytes);
    let saved = decoder.decode().map_err(|error| BadState::new(device, error.to_string()))?;
    match bytes.len() - decoder.position() {
        0 => Ok(saved),
        left => Err(BadState::new(device, format!("{left} bytes are left over"))),
    }
}
