//! Makes stored weights smaller.
//!
//! [`methods`] compress one weight each, with what [`calibrate`] learned of its input ([`hessian`]); a [`plan`] says which method goes where,
//! made by the [`planner`] for a size and held against a uniform one by the [`gate`], or written by hand; the [`pipeline`] takes a model from a source to a sink by it, one block
//! in memory at a time. [`compress`] is the way in.

pub mod calibrate;
pub mod convnet;
mod error;
pub mod factor;
pub mod gate;
pub mod hessian;
pub mod merge;
pub mod methods;
mod outcome;
pub mod pipeline;
pub mod plan;
pub mod planner;
mod progress;
pub mod recipe;
pub mod report;
pub mod sensitivity;
mod vector;

pub use error::{CompressError, MethodError};
pub use outcome::{Outcome, outcome};
pub use pipeline::{CompressJob, Goal, Report, compress};
pub use plan::{Plan, Scope};
pub use progress::{Progress, Silent};
pub use sensitivity::Sensitivity;
