//! Truncated singular value decomposition, of the weight or, with a Hessian, of the weight times a root of it (SVD-LLM, Wang et al.
//! 2024): then what is left out costs the layer's output least.
//!
//! For `H = L·Lᵀ` and `W·L = U·Σ·Vᵀ` the best approximation of rank r is `U_r·Σ_r·V_rᵀ·L⁻¹ = U_r·U_rᵀ·W`. So for a weight that is
//! no taller than wide only `W·H·Wᵀ = U·Σ²·Uᵀ` is decomposed, and no inverse is needed: singular H and W are no special case. A taller
//! one goes by `Lᵀ·Wᵀ·W·L = V·Σ²·Vᵀ`, with factors `W·L·V_r` and `V_rᵀ·L⁻¹`.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, SelfAdjointEvdParams, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::linalg::matmul::matmul;
use faer::linalg::triangular_solve::solve_lower_triangular_in_place;
use faer::{Accum, Mat, MatRef, Par, Spec};
use fourfold_tensor::{DType, Dense, FloatBuffer, Form, LowRank, Weight};
use serde::{Deserialize, Serialize};

use crate::MethodError;
use crate::factor::{Damped, cholesky, damped};
use crate::methods::quantize::grid::GridSpec;
use crate::methods::quantize::rtn::Rtn;
use crate::methods::{Compressed, Method, Needs, Stats, matrix};

/// The name in plans.
pub const NAME: &str = "svd";

/// How many singular values stay.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Rank {
    /// So many.
    Rank(usize),
    /// As many as fit into this share of the elements: `⌊s · rows · cols / (rows + cols)⌋`, at least one.
    Share(f64),
    /// As many as fit into so many bytes, at least one.
    Bytes(u64),
}

/// A truncated singular value decomposition.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Svd {
    /// How many singular values stay.
    pub rank: Rank,
    /// Whether the calibration's Hessian whitens the weight.
    #[serde(default)]
    pub whitened: bool,
    /// The grid that factors are rounded to; bf16 without.
    #[serde(default)]
    pub factors: Option<GridSpec>,
    /// Added to H's diagonal, as a share of its mean.
    #[serde(default = "default_damping")]
    pub damping: f64,
}

fn default_damping() -> f64 {
    0.01
}

impl Svd {
    /// The rank for a shape.
    ///
    /// # Errors
    /// A rank of 0 or above the matrix's.
    pub fn rank_for(&self, rows: usize, cols: usize) -> Result<usize, MethodError> {
        let most = rows.min(cols);
        let refuse = |rank| MethodError::Settings(format!("rank {rank}: a [{rows}, {cols}] matrix has 1 to {most}"));
        match self.rank {
            Rank::Rank(rank) if (1..=most).contains(&rank) => Ok(rank),
            Rank::Rank(rank) => Err(refuse(rank)),
            Rank::Share(share) if share > 0.0 && share <= 1.0 => {
                Ok(((share * (rows * cols) as f64 / (rows + cols) as f64) as usize).clamp(1, most))
            }
            Rank::Share(share) => Err(MethodError::Settings(format!("share {share} is not in (0, 1]"))),
            Rank::Bytes(bytes) => {
                // Bytes grow with the rank.
                let (mut low, mut high) = (1, most + 1);
                while high - low > 1 {
                    let middle = low + (high - low) / 2;
                    if self.form_of(rows, cols, middle).file_bytes() <= bytes { low = middle } else { high = middle }
                }
                Ok(low)
            }
        }
    }

    fn form_of(&self, rows: usize, cols: usize, rank: usize) -> Form {
        let factor = |rows, cols| {
            Box::new(match self.factors {
                Some(grid) => Form::Quantized(grid.form(rows, cols)),
                None => Form::Dense { shape: vec![rows, cols], dtype: DType::Bf16 },
            })
        };
        Form::LowRank { up: factor(rows, rank), down: factor(rank, cols) }
    }

    /// The factors of `w`, `[rows, cols]`, as they are stored.
    pub(crate) fn factorise(&self, w: &[f32], cols: usize, stats: &Stats) -> Result<Weight, MethodError> {
        let rows = w.len() / cols.max(1);
        let rank = self.rank_for(rows, cols)?;
        let hessian = match (self.whitened, stats.hessian) {
            (false, _) => None,
            (true, None) => return Err(MethodError::NoStatistics { method: NAME, needs: "a Hessian" }),
            (true, Some(h)) if h.size() != cols => {
                return Err(MethodError::Width { found: h.size(), expected: cols });
            }
            (true, Some(h)) => Some(damped(h, self.damping).0),
        };
        let Factors { up, down, .. } = truncate(w, cols, hessian, rank)?;
        let store = |values: Vec<f32>, shape: [usize; 2]| -> Result<Weight, MethodError> {
            match self.factors {
                None => Ok(Dense::new(shape.to_vec(), FloatBuffer::from_f32(values, DType::Bf16)).into()),
                Some(grid) => {
                    let dense = Dense::from_f32(shape.to_vec(), values).into();
                    Ok(Rtn { grid }.compress(&dense, Stats::default())?.weight)
                }
            }
        };
        let (up, down) = (store(up, [rows, rank])?, store(down, [rank, cols])?);
        Ok(LowRank::new(up, down).map_err(|e| MethodError::Settings(e.to_string()))?.into())
    }
}

impl Method for Svd {
    fn name(&self) -> &'static str {
        NAME
    }

    fn needs(&self) -> Needs {
        if self.whitened { Needs::Hessian } else { Needs::Nothing }
    }

    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError> {
        if let Some(grid) = &self.factors {
            grid.validate()?;
        }
        Ok(Some(self.form_of(rows, cols, self.rank_for(rows, cols)?)))
    }

    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError> {
        let w = matrix::read(weight)?;
        let stored = self.factorise(&w, weight.cols(), &stats)?;
        let error = matrix::relative_error(&w, &stored, &stats);
        Ok(Compressed { weight: stored, error })
    }
}

/// Two factors, and all singular values of what was decomposed, largest first.
pub struct Factors {
    /// `[rows, rank]`.
    pub up: Vec<f32>,
    /// `[rank, cols]`.
    pub down: Vec<f32>,
    /// `[min(rows, cols)]`.
    pub singular: Vec<f64>,
}

/// The best approximation of rank `rank`, which is at most the smaller side: see the module's text. One thread.
///
/// # Errors
/// [`MethodError::Indefinite`].
pub fn truncate(w: &[f32], cols: usize, hessian: Option<Damped>, rank: usize) -> Result<Factors, MethodError> {
    let rows = w.len() / cols.max(1);
    let w = Mat::from_fn(rows, cols, |r, c| f64::from(w[r * cols + c]));
    let product = |a: MatRef<f64>, b: MatRef<f64>| {
        let mut to = Mat::zeros(a.nrows(), b.ncols());
        matmul(to.as_mut(), Accum::Replace, a, b, 1.0, Par::Seq);
        to
    };
    let root = match hessian {
        Some(h) => Some(root(h, cols)?),
        None => None,
    };
    let whitened = match &root {
        Some(l) => product(w.as_ref(), l.as_ref()),
        None => w.clone(),
    };
    let flat = |m: MatRef<f64>| -> Vec<f32> {
        (0..m.nrows()).flat_map(|r| (0..m.ncols()).map(move |c| m[(r, c)] as f32)).collect()
    };
    if rows <= cols {
        let (singular, vectors) = eigen(product(whitened.as_ref(), whitened.transpose()))?;
        let up = vectors.subcols(0, rank);
        let down = product(up.transpose(), w.as_ref());
        return Ok(Factors { up: flat(up), down: flat(down.as_ref()), singular });
    }
    let (singular, vectors) = eigen(product(whitened.transpose(), whitened.as_ref()))?;
    let right = vectors.subcols(0, rank);
    let up = product(whitened.as_ref(), right);
    let mut down = right.to_owned();
    if let Some(l) = &root {
        // (V_rᵀ·L⁻¹)ᵀ = L⁻ᵀ·V_r: an upper triangular system, lower when both orders are reversed.
        let upper = l.transpose().reverse_rows_and_cols();
        solve_lower_triangular_in_place(upper, down.as_mut().reverse_rows_mut(), Par::Seq);
    }
    Ok(Factors { up: flat(up.as_ref()), down: flat(down.transpose()), singular })
}

/// L with `L·Lᵀ = H`.
fn root(hessian: Damped, n: usize) -> Result<Mat<f64>, MethodError> {
    let mut lower: Vec<f64> = hessian.matrix().iter().map(|&v| f64::from(v)).collect();
    if !cholesky(&mut lower, n) {
        return Err(MethodError::Indefinite { damping: default_damping() });
    }
    Ok(Mat::from_fn(n, n, |r, c| if c <= r { lower[r * n + c] } else { 0.0 }))
}

/// Square roots of the eigenvalues of a positive semidefinite matrix, largest first, and the eigenvectors in that order.
fn eigen(matrix: Mat<f64>) -> Result<(Vec<f64>, Mat<f64>), MethodError> {
    let n = matrix.nrows();
    let params = Spec::<SelfAdjointEvdParams, f64>::default();
    let mut memory = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, Par::Seq, params));
    let (mut values, mut vectors) = (Diag::<f64>::zeros(n), Mat::zeros(n, n));
    let stack = MemStack::new(&mut memory);
    self_adjoint_evd(matrix.as_ref(), values.as_mut(), Some(vectors.as_mut()), Par::Seq, stack, params)
        .map_err(|_| MethodError::Settings("the singular values did not converge".to_owned()))?;
    // They come smallest first.
    let singular = (0..n).rev().map(|i| values.column_vector()[i].max(0.0).sqrt()).collect();
    Ok((singular, Mat::from_fn(n, n, |r, c| vectors[(r, n - 1 - c)])))
}

/// The least rank that keeps this share of the energy, `Σ σ²`.
pub fn rank_for_energy(singular: &[f64], share: f64) -> usize {
    let total: f64 = singular.iter().map(|s| s * s).sum();
    let mut sum = 0.0;
    let enough = |s: &f64| {
        sum += s * s;
        sum >= share * total
    };
    singular.iter().position(enough).map_or(singular.len(), |i| i + 1).max(1)
}
