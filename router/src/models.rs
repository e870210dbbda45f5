//! The models that a router serves, as far as it has them: the text side of their pairs, and what compiles their guides. Pairs of
//! one name are versions of one model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use overfill_guide::Guides;
use overfill_text::TextModel;
use overfill_types::generation::GenerationSource;
use overfill_types::{Code, Fingerprint, GenerationConfig, ServiceError};

use crate::config::{RouterConfig, SpecialInMessages, ToolCallParser};
use crate::traffic::{Traffic, Version};

/// The models of one router. Clones share what was opened.
#[derive(Clone)]
pub struct Models {
    texts: Arc<[Arc<TextModel>]>,
    /// In the order of their texts.
    versions: Arc<[Version]>,
    guides: Arc<HashMap<Fingerprint, Arc<Guides>>>,
    traffic: Arc<RwLock<Traffic>>,
}

impl Models {
    /// Opens the pairs.
    ///
    /// # Errors
    /// Where one cannot be opened, or one is there twice ([`Code::InvalidArgument`]).
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
        let texts = pairs.iter().map(open).collect::<Result<Arc<[_]>, ServiceError>>()?;
        let versions: Arc<[Version]> = pairs
            .iter()
            .zip(texts.iter())
            .map(|(dir, text)| Version {
                model: text.manifest.name.clone(),
                folder: dir.file_name().unwrap_or_default().to_string_lossy().into_owned(),
                fingerprint: text.manifest.fingerprint.clone(),
            })
            .collect();
        let opened = pairs.iter().zip(texts.iter()).map(|(dir, model)| {
            let manifest = &model.manifest;
            (manifest.fingerprint.clone(), Guides::open(dir, manifest, guides))
        });
        let guides: HashMap<_, _> = opened.collect();
        if guides.len() < texts.len() {
            let message = "two of the pairs have one fingerprint, so they are the same model: name one of them only";
            return Err(ServiceError::new(Code::InvalidArgument, message));
        }
        let traffic = match &config.traffic {
            Some(file) => Traffic::read(file, &versions).map_err(|why| ServiceError::new(Code::InvalidArgument, why))?,
            None => Traffic::of_the_first(&versions),
        };
        Ok(Self { texts, versions, guides: Arc::new(guides), traffic: Arc::new(RwLock::new(traffic)) })
    }

    /// Takes the file of weights as it is now.
    ///
    /// # Errors
    /// What is wrong with it; then all stays as it was.
    pub(crate) fn shift_traffic(&self, file: &Path) -> Result<(), String> {
        let traffic = Traffic::read(file, &self.versions)?;
        *self.traffic.write().unwrap_or_else(PoisonError::into_inner) = traffic;
        Ok(())
    }

    /// All of them, each version by itself.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = &Arc<TextModel>> {
        self.texts.iter()
    }

    /// What clients may ask for, and the version that is meant or that gets most: each model by its name, and where it has several
    /// versions each of these too.
    pub(crate) fn names(&self) -> Vec<(String, Arc<TextModel>)> {
        let traffic = self.traffic.read().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<(String, Arc<TextModel>)> = Vec::new();
        for (version, text) in self.versions.iter().zip(self.texts.iter()) {
            let of_model = self.of_model(&version.model);
            if !names.iter().any(|(name, _)| *name == version.model)
                && let Some(most) = traffic.most(&of_model).and_then(|most| self.text(most))
            {
                names.push((version.model.clone(), most));
            }
            if of_model.len() > 1 {
                names.push((version.to_string(), text.clone()));
            }
        }
        names
    }

    /// Versions of a model, as they are asked for; empty where it has one only.
    pub(crate) fn versions(&self, model: &str) -> Vec<String> {
        let of_model = self.of_model(model);
        if of_model.len() < 2 { Vec::new() } else { of_model.iter().map(|version| version.fingerprint.short().to_owned()).collect() }
    }

    /// The model of this name, or the only one where none is named; of its versions the one that is named after an `@`, or one that is
    /// drawn by weight, among those that are `able` if any is.
    ///
    /// # Errors
    /// [`Code::NotFound`] naming those that are here.
    pub(crate) fn draw(&self, name: &str, able: impl Fn(&Fingerprint) -> bool) -> Result<Arc<TextModel>, ServiceError> {
        let mut of_model = self.of_model(name);
        if of_model.is_empty() && name.is_empty() {
            let all: Vec<&Version> = self.versions.iter().collect();
            if all.windows(2).all(|two| matches!(two, [a, b] if a.model == b.model)) {
                of_model = all;
            }
        }
        if of_model.is_empty()
            && let Some((model, version)) = name.rsplit_once('@')
        {
            of_model = self.of_model(model).into_iter().filter(|of| of.is(version)).collect();
            // A beginning that two fingerprints share names neither.
            of_model = if of_model.len() > 1 { Vec::new() } else { of_model };
        }
        let drawn = self.traffic.read().unwrap_or_else(PoisonError::into_inner).draw(&of_model, able);
        drawn.and_then(|version| self.text(version)).ok_or_else(|| {
            let here: Vec<String> = self.names().into_iter().map(|(name, _)| name).collect();
            let message = format!("model '{name}' is not served here: ask for one of {}", here.join(", "));
            ServiceError { field: Some("model".into()), ..ServiceError::new(Code::NotFound, message) }
        })
    }

    fn of_model(&self, name: &str) -> Vec<&Version> {
        self.versions.iter().filter(|version| version.model == name).collect()
    }

    fn text(&self, version: &Version) -> Option<Arc<TextModel>> {
        self.texts.iter().find(|text| text.manifest.fingerprint == version.fingerprint).cloned()
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
