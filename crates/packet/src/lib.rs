//! NIC backends: where the frames of a guest's network card go. User-mode NAT (no root) and tap devices.
//!
//! Both sit behind [`Backend`]. [`UserNet`] is a small router that lives inside the process: it gives the guest an
//! address by DHCP and router advertisement and turns what the guest sends into plain sockets of the host.
//! [`Tap`] hands frames to a tap device that the administrator made.
#![allow(unsafe_code)]

mod backend;
mod error;
mod mac;
mod tap;
mod user;
mod virtio_header;

pub use backend::{Backend, MacAddress, Offloads};
pub use error::NetError;
pub use mac::MacAddressError;
pub use tap::Tap;
pub use user::{Forward, ForwardError, Protocol, Subnet, SubnetError, UserNet, UserNetConfig, UserNetStats};
