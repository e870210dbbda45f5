//! The models that a router serves, as far as it has them: the text side of their pairs, and what compiles their guides.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use overfill_guide::Guides;
use overfill_text::TextModel;
use overfill_types::generation::GenerationSource;
use overfill_types::{Code, Fingerprint, GenerationConfig, ServiceError};

use crate::config::{RouterConfig, SpecialInMessages, ToolCallParser};

/// The models of one router. Clones share what was opened.
#[derive(Clone)]
pub struct Models {
    texts: Vec<Arc<TextModel>>,
    guides: HashMap<Fingerprint, Arc<Guides>>,
}

impl Models {
    /// Opens the pairs.
    ///
    /// # Errors
    /// Where one cannot be opened, or two have one name ([`Code::InvalidArgument`]).
    pub fn open(config: &RouterConfig) -> Result<Self, ServiceError> {
        let RouterConfig { pair: pairs, guides, .. } = config;
        let generation = match &config.generation_config {
            GenerationSource::Auto => None,
            GenerationSource::None => Some(GenerationConfig::default()),
            GenerationSource::File(file) => Some(GenerationSource::read(file)?),
        };
        let open = |dir: &PathBuf| {
            let mut text = TextModel::open(dir)?;
            text.manifest.generation = generation.unwrap_or(text.manifest.generation);
            if config.special_tokens_in_messages == SpecialInMessages::Special {
                text.trust_messages();
            }
            if let ToolCallParser::Format(format) = config.tool_call_parser {
                text.set_tool_format(format);
            }
            Ok(Arc::new(text))
        };
        let texts = pairs.iter().map(open).collect::<Result<Vec<_>, ServiceError>>()?;
        let opened = pairs.iter().zip(&texts).map(|(dir, model)| {
            let manifest = &model.manifest;
            (manifest.fingerprint.clone(), Guides::open(dir, manifest, guides))
        });
        let models = Self { guides: opened.collect(), texts };
        let mut names = HashSet::new();
        if let Some(twice) = models.names().find(|name| !names.insert(*name)) {
            let message = format!("two of them are named '{twice}', and clients ask for a model by its name: give one of them another");
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        Ok(models)
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<TextModel>> {
        self.texts.iter()
    }

    /// Their names, by which clients ask for them.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.texts.iter().map(|model| model.manifest.name.as_str())
    }

    /// The model of this name, or the only one where none is named.
    ///
    /// # Errors
    /// [`Code::NotFound`] naming those that are here.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<TextModel>, ServiceError> {
        let found = match self.texts.as_slice() {
            [only] if name.is_empty() => Some(only),
            texts => texts.iter().find(|model| model.manifest.name == name),
        };
        found.cloned().ok_or_else(|| {
            let here: Vec<&str> = self.names().collect();
            let message = format!("model '{name}' is not served here: ask for one of {}", here.join(", "));
            ServiceError { field: Some("model".into()), ..ServiceError::new(Code::NotFound, message) }
        })
    }

    /// What compiles a model's guides.
    ///
    /// # Errors
    /// [`Code::Internal`] for a model that is not served here.
    pub(crate) fn guides(&self, model: &TextModel) -> Result<Arc<Guides>, ServiceError> {
        let guides = self.guides.get(&model.manifest.fingerprint).cloned();
        guides.ok_or_else(|| ServiceError::new(Code::Internal, format!("model {} has no guides", model.manifest.name)))
    }
}
