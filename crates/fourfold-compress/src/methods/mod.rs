//! The methods, one file each, and the registry that makes them from a plan's words.
//!
//! A method knows one weight and what calibration saw of its input. It does not know the plan, the model or the files.

pub mod cast;
pub mod decompose;
pub(crate) mod matrix;
pub mod prune;
pub mod quantize;
mod range;

use fourfold_tensor::{Form, Weight};
use serde_json::Value;

use crate::MethodError;
use crate::hessian::Hessian;

/// What a method wants to know about a weight's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Needs {
    /// The weight alone.
    Nothing,
    /// Second moments E[x_i²] of each input (llama.cpp calls them the importance matrix). Used where given.
    Moments,
    /// The whole second-moment matrix E[x xᵀ].
    Hessian,
}

/// What calibration saw of a weight's input.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats<'a> {
    /// E[x_i²], `[cols]`.
    pub moments: Option<&'a [f32]>,
    /// 2·E[x xᵀ], `[cols, cols]`.
    pub hessian: Option<&'a Hessian>,
}

/// A compressed weight and what it cost.
#[derive(Clone, Debug)]
pub struct Compressed {
    /// The new storage form.
    pub weight: Weight,
    /// Energy of the output's error relative to the output's: tr(ΔHΔᵀ)/tr(WHWᵀ), with the best H known: the Hessian, the
    /// moments on its diagonal, or the identity. 0 for a weight of zeros.
    pub error: f64,
}

/// A way to make a weight smaller.
pub trait Method: Send + Sync {
    /// The name in plans.
    fn name(&self) -> &'static str;

    /// What calibration must supply.
    fn needs(&self) -> Needs;

    /// The form a `[rows, cols]` weight takes, without compressing it: what it costs in bytes
    /// ([`Form::file_bytes`]). `None` where it stays as it came.
    ///
    /// # Errors
    /// Settings that do not go together.
    fn form(&self, rows: usize, cols: usize) -> Result<Option<Form>, MethodError>;

    /// Compresses a weight. The result does not depend on the number of threads.
    ///
    /// # Errors
    /// A value that is not finite, settings that do not fit, or missing statistics.
    fn compress(&self, weight: &Weight, stats: Stats) -> Result<Compressed, MethodError>;
}

/// A line of the registry: a name, and how settings become a method.
type Constructor = fn(&Value) -> Result<Box<dyn Method>, MethodError>;

/// Every method there is. One line each.
const REGISTRY: &[(&str, Constructor)] = &[
    ("keep", |_| Ok(Box::new(Keep))),
    (cast::NAME, |settings| Ok(Box::new(settings_of::<cast::Cast>(settings)?))),
    (quantize::rtn::NAME, |settings| Ok(Box::new(settings_of::<quantize::rtn::Rtn>(settings)?))),
    (quantize::gptq::NAME, |settings| Ok(Box::new(settings_of::<quantize::gptq::Gptq>(settings)?))),
    (quantize::blocks::NAME, |settings| Ok(Box::new(settings_of::<quantize::blocks::Blocks>(settings)?))),
    (prune::magnitude::NAME, |settings| Ok(Box::new(settings_of::<prune::magnitude::Magnitude>(settings)?))),
    (prune::nm::NAME, |settings| Ok(Box::new(settings_of::<prune::nm::Nm>(settings)?))),
    (prune::wanda::NAME, |settings| Ok(Box::new(settings_of::<prune::wanda::Wanda>(settings)?))),
    (prune::sparsegpt::NAME, |settings| Ok(Box::new(settings_of::<prune::sparsegpt::SparseGpt>(settings)?))),
    (decompose::svd::NAME, |settings| Ok(Box::new(settings_of::<decompose::svd::Svd>(settings)?))),
    (decompose::residual::NAME, |settings| Ok(Box::new(settings_of::<decompose::residual::Residual>(settings)?))),
    (decompose::low_rank_sparse::NAME, |settings| {
        Ok(Box::new(settings_of::<decompose::low_rank_sparse::LowRankSparse>(settings)?))
    }),
];

/// Makes the method that a plan names.
///
/// # Errors
/// An unknown name, or settings the method does not have.
pub fn method(name: &str, settings: &Value) -> Result<Box<dyn Method>, MethodError> {
    let (_, make) =
        REGISTRY.iter().find(|(known, _)| *known == name).ok_or_else(|| MethodError::Unknown(name.to_owned()))?;
    make(settings)
}

/// Names of every method.
pub fn names() -> impl Iterator<Item = &'static str> {
    REGISTRY.iter().map(|(name, _)| *name)
}

fn settings_of<T: serde::de::DeserializeOwned>(settings: &Value) -> Result<T, MethodError> {
    serde_json::from_value(settings.clone()).map_err(|e| MethodError::Settings(e.to_string()))
}

/// Stores the weight as it came: norms, routers, biases.
pub struct Keep;

impl Method for Keep {
    fn name(&self) -> &'static str {
        "keep"
    }

    fn needs(&self) -> Needs {
        Needs::Nothing
    }

    fn form(&self, _rows: usize, _cols: usize) -> Result<Option<Form>, MethodError> {
        Ok(None)
    }

    fn compress(&self, weight: &Weight, _stats: Stats) -> Result<Compressed, MethodError> {
        Ok(Compressed { weight: weight.clone(), error: 0.0 })
    }
}
