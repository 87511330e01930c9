//! Methods that store a weight, or a part of it, as thin factors; and decompositions of convolution kernels.

pub mod cp;
pub mod kernel;
pub mod low_rank_sparse;
pub mod residual;
pub mod svd;
pub mod tucker;
