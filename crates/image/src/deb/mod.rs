//! The formats of a Debian archive: control data, versions, relations, indices and packages.

pub mod control;
pub mod package_file;
pub mod packages;
pub mod relation;
pub mod release;
pub mod resolve;
pub mod version;
