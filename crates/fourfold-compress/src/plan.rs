//! A plan says, tensor by tensor, how a model is to be compressed. It is data: a JSON file that a person can read, edit and run
//! again.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};

use fourfold_models::{ModelError, ModelSpec, Role, WeightSpec};
use fourfold_tensor::{BlockType, DType, Form, TensorInfo, Weight, WeightSource};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::CompressError;
use crate::methods::quantize::blocks;
use crate::methods::quantize::gptq::Gptq;
use crate::methods::quantize::grid::GridSpec;
use crate::methods::{self, Method};

/// What is to be done with each tensor of a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// One entry a tensor, in the order of the stack.
    pub tensors: Vec<Entry>,
}

/// What is to be done with one tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The tensor's Hugging Face name.
    pub name: String,
    /// The method's name in the registry.
    pub method: String,
    /// The method's settings.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub settings: Value,
    /// Bytes in the file, all parts together. Filled in by the program.
    #[serde(default)]
    pub bytes: u64,
    /// Energy of the output's error relative to the output's: estimated in a plan, measured in a report.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<f64>,
}

impl Entry {
    /// The method.
    ///
    /// # Errors
    /// An unknown name, or settings the method does not have.
    pub fn method(&self) -> Result<Box<dyn Method>, CompressError> {
        methods::method(&self.method, &self.settings).map_err(|e| e.of(&self.name))
    }

    /// The grid or block type in words, where the method has one.
    pub fn format(&self) -> Option<String> {
        if self.method == blocks::NAME {
            return Some(self.settings["type"].as_str()?.to_owned());
        }
        Some(serde_json::from_value::<Gptq>(self.settings.clone()).ok()?.grid.describe())
    }

    /// The tensor as it came.
    pub fn keep(name: &str) -> Self {
        Self { name: name.to_owned(), method: "keep".to_owned(), settings: Value::Null, bytes: 0, error: None }
    }
}

/// Which tensors are compressed, beside the matrices of linear layers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scope {
    /// Whether embeddings are.
    pub embeddings: bool,
    /// The grid of the biases, which stay as they are without one, or where it would make them larger.
    pub biases: Option<GridSpec>,
    /// Whether groups must divide their rows: compressed-tensors knows no short group.
    pub whole_groups: bool,
    /// Whether the routed experts of all blocks get one format: transformers decodes no other mixture from compressed-tensors.
    pub experts_alike: bool,
    /// Whether weights that runtimes multiply at once get one format: query, key and value of a layer, its gate and up, the experts of a
    /// block. This program needs none of that.
    pub alike: bool,
    /// Whether the output stacks the experts of a layer in one tensor of one type, as GGUF does.
    pub stacked: bool,
}

impl Default for Scope {
    fn default() -> Self {
        Self { embeddings: true, biases: None, whole_groups: false, experts_alike: false, alike: false, stacked: false }
    }
}

impl Scope {
    /// Whether a tensor is to be compressed as a matrix.
    pub(crate) fn has_matrix(&self, weight: &WeightSpec) -> bool {
        is_compressible(weight) && (self.embeddings || weight.role != Role::Embedding)
    }

    /// The entry of a bias that is to be quantized.
    pub(crate) fn bias(&self, weight: &WeightSpec) -> Option<(Entry, Form)> {
        let grid = self.biases.filter(|_| weight.role == Role::Bias)?;
        let (rows, cols) = matrix(&weight.shape);
        let form = Form::Quantized(grid.form(rows, cols));
        // Whatever the original's type, two bytes an element are what it could be had for.
        let smaller = form.file_bytes() < 2 * weight.elements();
        let entry = Entry {
            method: "rtn".to_owned(),
            settings: json!(grid),
            bytes: form.file_bytes(),
            ..Entry::keep(&weight.name)
        };
        smaller.then_some((entry, form))
    }
}

impl Plan {
    /// The same method for every matrix that is worth it ([`is_compressible`]) and in scope; all else stays as it is.
    pub fn uniform(spec: &ModelSpec, method: &str, settings: &Value, scope: &Scope) -> Self {
        let weights = spec.weights();
        let tensors = weights.iter().map(|weight| {
            if let Some((entry, _)) = scope.bias(weight) {
                entry
            } else if scope.has_matrix(weight) {
                let method = for_role(method, weight.role, spec.tied);
                let settings = if method == "rtn" { without_gptq(settings) } else { settings.clone() };
                Entry { method: method.to_owned(), settings, ..Entry::keep(&weight.name) }
            } else {
                Entry::keep(&weight.name)
            }
        });
        Self { tensors: tensors.collect() }
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// What is wrong with the text, with line and column.
    pub fn from_json(text: &str) -> Result<Self, CompressError> {
        serde_json::from_str(text).map_err(|e| CompressError::Plan(e.to_string()))
    }

    /// The plan as indented JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_default()
    }

    /// Bytes of all tensors, without the file's header.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes).sum()
    }

    /// Checks the plan against a model, for a safetensors file: see [`Plan::resolve_for`].
    ///
    /// # Errors
    /// The first tensor that does not fit.
    pub fn resolve(
        &mut self,
        spec: &ModelSpec,
        source: &dyn WeightSource,
    ) -> Result<Vec<(String, Form)>, CompressError> {
        self.resolve_for(spec, source, SAFETENSORS_BYTES)
    }

    /// Checks the plan against a model: every tensor named once, every method known. Fills in sizes, and returns the forms in
    /// the plan's order.
    ///
    /// # Errors
    /// The first tensor that does not fit.
    pub fn resolve_for(
        &mut self,
        spec: &ModelSpec,
        source: &dyn WeightSource,
        bytes: &TensorBytes,
    ) -> Result<Vec<(String, Form)>, CompressError> {
        let weights = spec.weights();
        let entries: HashSet<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        if let Some(missing) = weights.iter().find(|w| !entries.contains(w.name.as_str())) {
            return Err(CompressError::Plan(format!("no entry for tensor {}", missing.name)));
        }
        let known: HashMap<&str, &WeightSpec> = weights.iter().map(|w| (w.name.as_str(), w)).collect();
        let mut seen = HashSet::new();
        let mut forms: Vec<(String, Form)> = Vec::with_capacity(self.tensors.len());
        for entry in &mut self.tensors {
            let Some(weight) = known.get(entry.name.as_str()) else {
                return Err(CompressError::Plan(format!("the model has no tensor {}", entry.name)));
            };
            if !seen.insert(entry.name.clone()) {
                return Err(CompressError::Plan(format!("two entries for tensor {}", entry.name)));
            }
            let method = entry.method()?;
            let (rows, cols) = matrix(&weight.shape);
            if let Some(info) = source.info(&entry.name).filter(|info| matrix(&info.shape) != (rows, cols)) {
                let (tensor, expected, found) = (entry.name.clone(), weight.shape.clone(), info.shape.clone());
                return Err(ModelError::Shape { tensor, expected, found }.into());
            }
            let form = match method.form(rows, cols).map_err(|e| e.of(&entry.name))? {
                Some(form) => form,
                None => kept_form(source, &entry.name)?,
            };
            entry.bytes = bytes(&entry.name, &form);
            forms.push((entry.name.clone(), form));
        }
        Ok(forms)
    }
}

/// An error to five digits, as a plan shows it: what is read back is what was written.
pub(crate) fn shown(error: f64) -> f64 {
    format!("{error:.4e}").parse().unwrap_or(error)
}

/// Rows and columns of a shape's matrix view.
pub(crate) fn matrix(shape: &[usize]) -> (usize, usize) {
    if shape.len() < 2 { (1, shape.iter().product()) } else { (shape[0], shape[1..].iter().product()) }
}

/// The entry of a tensor that goes into a GGUF file as it is: floats and blocks of a type of GGUF's own stay, what is packed otherwise
/// becomes f16.
pub fn kept_in_gguf(weight: &Weight, name: &str) -> Entry {
    let kept = match weight {
        // FP8 is written as the bf16 that it stands for.
        Weight::Dense(_) | Weight::Fp8(_) => true,
        Weight::Quantized(q) => BlockType::of(q).is_some(),
        Weight::Sparse(_) | Weight::LowRank(_) | Weight::Sum(_) => false,
    };
    if kept {
        return Entry::keep(name);
    }
    Entry { method: "cast".to_owned(), settings: json!({"dtype": "f16"}), ..Entry::keep(name) }
}

/// The form of a tensor that stays as it is; a storage that its name does not tell is read to see.
pub(crate) fn kept_form(source: &dyn WeightSource, name: &str) -> Result<Form, CompressError> {
    let known = source.info(name).and_then(|info: &TensorInfo| {
        let dtype =
            [DType::F32, DType::F16, DType::Bf16, DType::F8E4M3].into_iter().find(|d| d.name() == info.storage)?;
        // See `Form::of`.
        let dtype = if dtype == DType::F8E4M3 { DType::Bf16 } else { dtype };
        Some(Form::Dense { shape: info.shape.clone(), dtype })
    });
    match known {
        Some(form) => Ok(form),
        None => Ok(Form::of(&source.load(name)?)),
    }
}

/// Whether a tensor is a matrix whose bytes count and whose precision may go: embeddings and linear layers. Norms and routers stay
/// as they are, and so do biases unless [`Scope::biases`] says otherwise.
pub fn is_compressible(weight: &WeightSpec) -> bool {
    let role = match weight.role {
        Role::Embedding
        | Role::LmHead
        | Role::Attention
        | Role::Mlp
        | Role::SharedExpert
        | Role::RoutedExpert
        | Role::Convolution => true,
        Role::Router | Role::Norm | Role::Bias | Role::RunningMean | Role::RunningVariance => false,
    };
    role && weight.shape.len() >= 2
}

/// The method for a role: an untied embedding is a table, multiplied with nothing, so there is no Hessian for it.
fn for_role(method: &str, role: Role, tied: bool) -> &str {
    if method == "gptq" && role == Role::Embedding && !tied { "rtn" } else { method }
}

/// Settings of a grid alone.
fn without_gptq(settings: &Value) -> Value {
    let mut settings = settings.clone();
    if let Some(map) = settings.as_object_mut() {
        for key in ["damping", "order", "polish"] {
            map.remove(key);
        }
    }
    settings
}

/// Bytes that a tensor of this name and form takes in the output: the format knows.
pub type TensorBytes<'a> = dyn Fn(&str, &Form) -> u64 + 'a;

/// What a tensor takes in a safetensors file.
pub const SAFETENSORS_BYTES: &TensorBytes<'static> = &|_, form| form.file_bytes();

/// Bytes that file headers take beside tensors of these names and forms: the output's format knows.
pub type HeaderBytes<'a> = dyn Fn(&[(String, Form)]) -> u64 + 'a;

/// One way to store a tensor, or several that must be stored alike.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Each tensor's form and its entry of the plan.
    pub parts: Vec<(Form, Entry)>,
    /// Bytes in the file, together.
    pub bytes: u64,
    /// What it costs, in one unit for all tensors: an estimate of the model's divergence.
    pub cost: f64,
}

impl Choice {
    /// For one tensor.
    pub fn of(form: Form, entry: Entry, cost: f64) -> Self {
        Self { bytes: entry.bytes, parts: vec![(form, entry)], cost }
    }

    /// Names and forms.
    fn forms(&self) -> Vec<(String, Form)> {
        self.parts.iter().map(|(form, entry)| (entry.name.clone(), form.clone())).collect()
    }

    /// For the tensors of both.
    fn with(mut self, other: &Self) -> Self {
        self.parts.extend_from_slice(&other.parts);
        Self { parts: self.parts, bytes: self.bytes + other.bytes, cost: self.cost + other.cost }
    }
}

/// The ways to store two sets of tensors alike: with one method and the same settings.
pub fn alike(some: Vec<Choice>, others: &[Choice]) -> Vec<Choice> {
    let same = |a: &Choice, b: &Choice| match (a.parts.first(), b.parts.first()) {
        (Some((_, a)), Some((_, b))) => a.method == b.method && a.settings == b.settings,
        (None, _) | (_, None) => true,
    };
    let pair = |a: Choice| others.iter().find(|b| same(&a, b)).map(|b| a.with(b));
    some.into_iter().filter_map(pair).collect()
}

/// Picks one choice a tensor so that their bytes and the file headers are at most `budget` and the summed cost is small: from each
/// tensor's lower convex hull, always the step that saves most cost a byte, as long as one fits.
///
/// # Errors
/// [`CompressError::Budget`] where even the smallest choices are too large.
pub fn allocate(mut tensors: Vec<Vec<Choice>>, budget: u64, header: &HeaderBytes) -> Result<Plan, CompressError> {
    // A form of many parts has a longer header: choices are compared with what a header of their own has.
    let empty = header(&[]);
    for choice in tensors.iter_mut().flatten() {
        choice.bytes += header(&choice.forms()).saturating_sub(empty);
    }
    let hulls: Vec<Vec<Choice>> = tensors.into_iter().map(hull).collect();
    // What is counted by choices, and the bytes of the file that they make.
    let sizes = |picked: &[usize]| {
        let choices = || hulls.iter().zip(picked).filter_map(|(hull, &i)| hull.get(i));
        let forms: Vec<(String, Form)> = choices().flat_map(Choice::forms).collect();
        let data: u64 = choices().flat_map(|c| &c.parts).map(|(_, entry)| entry.bytes).sum();
        (choices().map(|c| c.bytes).sum::<u64>(), data + header(&forms))
    };
    let (counted, file) = sizes(&vec![0; hulls.len()]);
    if file > budget {
        return Err(CompressError::Budget { smallest: file, budget });
    }
    // One header for all differs a little from the sum of their own: the room shrinks until the file fits.
    let mut room = (budget + counted) - file;
    let picked = loop {
        let picked = fill(&hulls, room);
        let (counted, file) = sizes(&picked);
        if file <= budget || picked.iter().all(|&i| i == 0) {
            break picked;
        }
        room = (room - 1).min((budget + counted).saturating_sub(file));
    };
    let choices = hulls.into_iter().zip(picked).filter_map(|(h, i)| h.into_iter().nth(i));
    Ok(Plan { tensors: choices.flat_map(|c| c.parts).map(|(_, entry)| entry).collect() })
}

/// The choice of each hull, with at most `room` bytes together where the smallest choices have no more.
fn fill(hulls: &[Vec<Choice>], room: u64) -> Vec<usize> {
    let mut picked = vec![0usize; hulls.len()];
    let mut bytes: u64 = hulls.iter().filter_map(|h| h.first()).map(|c| c.bytes).sum();
    // On a hull each step saves less a byte than the one before it, so one order of all steps serves every tensor.
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (t, hull) in hulls.iter().enumerate() {
        let saved = |w: &[Choice]| (w[0].cost - w[1].cost) / (w[1].bytes - w[0].bytes).max(1) as f64;
        steps.extend(hull.windows(2).enumerate().map(|(i, w)| (saved(w), t, i)));
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    for (_, t, i) in steps {
        let more = hulls[t][i + 1].bytes - hulls[t][i].bytes;
        if picked[t] == i && bytes + more <= room {
            picked[t] = i + 1;
            bytes += more;
        }
    }
    picked
}

/// The choices that are best at some price of a byte, by rising bytes and falling cost.
fn hull(mut choices: Vec<Choice>) -> Vec<Choice> {
    choices.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.cost.partial_cmp(&b.cost).unwrap_or(Ordering::Equal)));
    let mut kept: Vec<Choice> = Vec::new();
    for choice in choices {
        if kept.last().is_some_and(|last| choice.cost >= last.cost) {
            continue;
        }
        // Drop a middle one that lies above the line from the one before it to this.
        while let [.., a, b] = kept.as_slice() {
            let slope = |from: &Choice, to: &Choice| (from.cost - to.cost) / (to.bytes - from.bytes).max(1) as f64;
            if slope(a, b) < slope(b, &choice) {
                kept.pop();
            } else {
                break;
            }
        }
        kept.push(choice);
    }
    kept
}
