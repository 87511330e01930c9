//! The model that is learned from (`--teacher`), and what a checkpoint remembers of it.

use std::sync::Arc;

use anyhow::{Result, ensure};
use fourfold_formats::TokenizerSource;
use fourfold_infer::Tokenizer;
use fourfold_kernels::backward::SoftTargets;
use fourfold_models::ModelSpec;
use fourfold_tensor::{SourceError, WeightSource};
use fourfold_train::distill::Teacher;
use fourfold_train::store::{ParameterStore, Tune};

use super::settings::{Settings, TeacherSettings};
use crate::context::Context;
use crate::model;

/// Opens the teacher of a model of `spec` that reads with `tokenizer`.
pub(super) fn open(
    settings: &TeacherSettings,
    spec: &ModelSpec,
    tokenizer: &Tokenizer,
    context: &Context,
) -> Result<(Teacher, String)> {
    let TeacherSettings { model: name, soft } = settings;
    let open = model::open(name, context)?;
    ensure!(
        open.spec.outputs() == spec.outputs(),
        "--teacher {name}: its head has {} outputs, the model's {}; both must have one vocabulary",
        open.spec.outputs(),
        spec.outputs()
    );
    if open.checkpoint.tokenizer != TokenizerSource::None {
        check_same(name, &open.tokenizer()?, tokenizer)?;
    }
    let source: Arc<dyn WeightSource> = Arc::from(open.checkpoint.weights);
    let SoftTargets { temperature, weight } = soft;
    let objective = format!("from teacher {}, temperature {temperature}, weight {weight}", fingerprint(&*source)?);
    Ok((Teacher::new(open.spec, source, *soft), objective))
}

/// What a checkpoint remembers of what is learned: `None` where it is the text alone, by a model that is all trained.
pub(super) fn objective(
    settings: &Settings,
    store: &ParameterStore,
    of_teacher: Option<String>,
) -> Result<Option<String>> {
    let tuned = match (settings.tune, store.base()) {
        (Some(Tune::Scales), Some(base)) => Some(format!("scales and norms of model {}", fingerprint(base)?)),
        (Some(Tune::Norms), Some(base)) => Some(format!("norms of model {}", fingerprint(base)?)),
        _ => None,
    };
    let parts: Vec<String> = tuned.into_iter().chain(of_teacher).collect();
    Ok((!parts.is_empty()).then(|| parts.join(", ")))
}

/// Both must give the same tokens the same numbers.
fn check_same(name: &str, teacher: &Tokenizer, model: &Tokenizer) -> Result<()> {
    for id in 0..teacher.vocab_size().max(model.vocab_size()) as u32 {
        let (of_teacher, of_model) = (teacher.id_to_token(id), model.id_to_token(id));
        ensure!(
            of_teacher == of_model,
            "--teacher {name}: its tokenizer is another one: token {id} is {} there, {} in the model",
            shown(of_teacher.as_deref()),
            shown(of_model.as_deref())
        );
    }
    Ok(())
}

fn shown(token: Option<&str>) -> String {
    token.map_or_else(|| "nothing".to_owned(), |token| format!("{token:?}"))
}

/// Sixteen digits that tell models apart, wherever they lie: of what their tensors are called and how they are stored, and of one row
/// of each of the first few.
fn fingerprint(source: &dyn WeightSource) -> Result<String, SourceError> {
    const LOOKED_AT: usize = 8;
    // FNV-1a (Fowler, Noll & Vo).
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut add = |bytes: &[u8]| {
        bytes.iter().for_each(|&byte| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    };
    for (i, info) in source.tensors().iter().enumerate() {
        add(info.name.as_bytes());
        add(info.storage.as_bytes());
        add(&info.bytes.to_le_bytes());
        if i < LOOKED_AT {
            let weight = source.load(&info.name)?;
            let mut row = vec![0.0; weight.cols()];
            weight.read_row(weight.rows() / 2, &mut row);
            row.iter().for_each(|value| add(&value.to_le_bytes()));
        }
    }
    Ok(format!("{hash:016x}"))
}
