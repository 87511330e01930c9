//! Methods that store a weight, or a part of it, as thin factors.

pub mod low_rank_sparse;
pub mod residual;
pub mod svd;
