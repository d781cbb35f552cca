//! NIC backends: where the frames of a guest's network card go. User-mode NAT (no root) and tap devices.
#![allow(unsafe_code)]

mod backend;

pub use backend::{Backend, MacAddress, Offloads};
