//! qcow2 images, versions 2 and 3 (QEMU docs/interop/qcow2.txt).
//!
//! **Order of writes.** Guest data and refcounts go to the file at once; L2 tables and the L1 table stay in memory
//! until a flush and are then written in steps with a sync between them: data and refcounts, L2, L1. What is on
//! stable storage therefore never points to anything that is not, and a crash of the host, too, leaves at worst
//! clusters that are counted but not used. Clusters that fall free are given back only when nothing on stable
//! storage points to them any more and no request that began earlier is under way.

mod check;
mod compressed;
mod create;
mod disk;
mod header;
mod l2;
mod metadata;
mod refcount;

#[cfg(test)]
mod tests;

pub use check::{CheckReport, check};
pub use create::create_qcow2;
pub use disk::Qcow2;
pub use header::{MAGIC, read_header};
