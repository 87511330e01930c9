//! Makes stored weights smaller: [`methods`] compress one weight each, with what [`hessian`] learned of its input.

mod error;
pub mod factor;
pub mod hessian;
pub mod methods;
mod vector;

pub use error::{CompressError, MethodError};
