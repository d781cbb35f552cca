//! Guest memory: the one room where guest-physical addresses become host addresses.
//!
//! RAM is one host mapping, shown to the guest as up to two ranges: `[0, low_bytes)` below the PCI hole and
//! `[4 GiB, …)` above it. Everything that the guest can change while we look at it is read and written
//! through volatile or atomic accesses; no Rust reference to guest RAM is ever formed.
//!
//! A page may be *watched* (see [`GuestMemory::watch_page`]): a CPU engine that cached decoded or translated
//! code of a page is told when anyone else (a device) writes to it. The grain of a watch is 64 bytes, so that data
//! beside code is written at little cost.
#![allow(unsafe_code)]

mod guest;
mod slice;

pub use guest::{GuestMemory, HIGH_RAM_START, MemoryError, PAGE_BYTES, PageWatch, WeakGuestMemory};
pub use slice::{GuestSlice, Pod};
