//! Names of a checkpoint's tensors that are not the model's own, read as transformers reads them: a bare base model
//! (`LlamaModel`) is stored without the `model.` before its names, and of two tied matrices a checkpoint may hold
//! either.

use std::collections::{HashMap, HashSet};

use fourfold_tensor::{SourceError, TensorInfo, Weight, WeightSource};

use crate::layers::{EMBEDDING, LM_HEAD_WEIGHT};
use crate::{ModelError, ModelSpec};

/// What every architecture's base model is called in its language model: `model.layers.0…` is `layers.0…` of a base
/// model.
const BASE: &str = "model.";

/// A source under the names that a model asks for.
struct Renamed {
    source: Box<dyn WeightSource>,
    infos: Vec<TensorInfo>,
    /// Place in `infos`, by the model's name.
    places: HashMap<String, usize>,
    /// The source's own names, in the order of `infos`.
    stored: Vec<String>,
}

/// The tensors of `source` under the names of `spec`. A tensor that `spec` knows keeps its name; one that it knows with
/// `model.` before it gets that name; the output projection of a tied model stands in for an embedding that is absent.
///
/// # Errors
/// [`ModelError::TwoNames`]: two tensors would have one name.
pub fn with_model_names(spec: &ModelSpec, source: Box<dyn WeightSource>) -> Result<Box<dyn WeightSource>, ModelError> {
    let weights = spec.weights();
    let known: HashSet<&str> = weights.iter().map(|weight| weight.name.as_str()).collect();
    let bare_embedding = EMBEDDING.strip_prefix(BASE).unwrap_or(EMBEDDING);
    let has_embedding = [EMBEDDING, bare_embedding].iter().any(|name| source.info(name).is_some());
    let name_of = |stored: &str| {
        let with_base = format!("{BASE}{stored}");
        if spec.tied && stored == LM_HEAD_WEIGHT && !has_embedding {
            EMBEDDING.to_owned()
        } else if !known.contains(stored) && known.contains(with_base.as_str()) {
            with_base
        } else {
            stored.to_owned()
        }
    };
    let stored: Vec<String> = source.tensors().iter().map(|info| info.name.clone()).collect();
    let names: Vec<String> = stored.iter().map(|name| name_of(name)).collect();
    if names == stored {
        return Ok(source);
    }
    let mut places = HashMap::with_capacity(names.len());
    for (place, name) in names.iter().enumerate() {
        if let Some(first) = places.insert(name.clone(), place) {
            let (first, second) = (stored[first].clone(), stored[place].clone());
            return Err(ModelError::TwoNames { tensor: name.clone(), first, second });
        }
    }
    let infos = source.tensors().iter().zip(names).map(|(info, name)| TensorInfo { name, ..info.clone() }).collect();
    Ok(Box::new(Renamed { source, infos, places, stored }))
}

impl WeightSource for Renamed {
    fn tensors(&self) -> &[TensorInfo] {
        &self.infos
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.places.get(name).map(|&place| &self.infos[place])
    }

    fn load(&self, name: &str) -> Result<Weight, SourceError> {
        self.source.load(self.places.get(name).map_or(name, |&place| &self.stored[place]))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::spec_from_config;
    use crate::testing::RandomWeights;

    fn spec(tied: bool) -> ModelSpec {
        spec_from_config(&json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "tie_word_embeddings": tied,
        }))
        .unwrap()
    }

    #[test]
    fn bare_names_are_the_models() {
        let spec = spec(false);
        let (bare, own) = ("layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight");
        let source = RandomWeights::new(&spec, 0).without(own).with(bare, &[8, 8]).with("layers.7.norm.weight", &[2]);
        let named = with_model_names(&spec, Box::new(source)).unwrap();
        assert_eq!(named.load(own).unwrap().shape(), [8, 8]);
        assert!(named.info(bare).is_none());
        assert!(named.info("layers.7.norm.weight").is_some(), "what no layer reads keeps its name");
        let both = RandomWeights::new(&spec, 0).with(bare, &[8, 8]);
        let error = with_model_names(&spec, Box::new(both)).err().unwrap();
        assert!(matches!(error, ModelError::TwoNames { .. }), "{error}");
    }

    #[test]
    fn a_tied_head_stands_in_for_the_embedding() {
        let head = |tied| RandomWeights::new(&spec(tied), 0).without(EMBEDDING).with(LM_HEAD_WEIGHT, &[8, 8]);
        let named = with_model_names(&spec(true), Box::new(head(true))).unwrap();
        assert_eq!(named.load(EMBEDDING).unwrap().shape(), [8, 8]);
        // Without tying, the projection says nothing of the embedding.
        let named = with_model_names(&spec(false), Box::new(head(false))).unwrap();
        assert!(named.info(EMBEDDING).is_none());
    }
}
