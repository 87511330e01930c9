//! What lies on the disk after a crash: outputs are whole or absent, one run writes a place at a time, inputs are known by
//! their content and outputs by their checksums.
//!
//! Every command publishes through [`publish`] (a directory) or [`PartialFile`] (a file): all bytes and names are made durable,
//! then one rename shows them. Nothing here knows what the files hold.

mod checksums;
mod error;
mod fingerprint;
mod lock;
mod partial;
mod place;
mod publish;

pub use checksums::{CHECKSUMS, Finding, Verification, sha256_of_file, verify, write_checksums};
pub use error::DiskError;
pub use fingerprint::{Identity, Inputs};
pub use lock::Lock;
pub use partial::{PartialFile, remove_unfinished, write_whole};
pub use place::{Use, output_directory, output_file};
pub use publish::{Disk, System, copy_file, create_dir_durably, publish, restore, sync_dir, sync_tree, write_file};
