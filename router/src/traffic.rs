//! Which version of a model answers. Pairs of one name are versions of one model: each request is given to one of them, by weights
//! that a file says and that may change while the router runs.
//!
//! **Invariant:** a version that has no nodes gets no request as long as another one that is to get some has them.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use overfill_types::Fingerprint;
use rand::seq::IndexedRandom;

/// Fewest digits of a fingerprint that name a version.
const FEWEST_DIGITS: usize = 8;

/// A pair, as one version of the model that its name names.
#[derive(Clone, Debug)]
pub(crate) struct Version {
    /// The pair's name.
    pub(crate) model: String,
    /// Name of the pair's folder.
    pub(crate) folder: String,
    pub(crate) fingerprint: Fingerprint,
}

impl Version {
    /// Whether this is what people call it: the name of its folder, or how its fingerprint begins.
    pub(crate) fn is(&self, name: &str) -> bool {
        self.folder == name || (name.len() >= FEWEST_DIGITS && self.fingerprint.as_str().starts_with(name))
    }
}

/// As clients ask for it alone.
impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.model, self.fingerprint.short())
    }
}

/// The part that each version gets of its model's requests, as the file has it: model to version to weight.
type File = HashMap<String, HashMap<String, u32>>;

/// Weights of all versions.
#[derive(Debug, PartialEq)]
pub(crate) struct Traffic(HashMap<Fingerprint, u32>);

impl Traffic {
    /// The first version of each model gets all of its requests.
    pub(crate) fn of_the_first(versions: &[Version]) -> Self {
        let mut weights = HashMap::new();
        for (number, version) in versions.iter().enumerate() {
            let first = !versions.iter().take(number).any(|before| before.model == version.model);
            weights.insert(version.fingerprint.clone(), u32::from(first));
        }
        Self(weights)
    }

    /// As `file` says it. A version that is not named gets nothing; a model that is not named, as without a file.
    ///
    /// # Errors
    /// Where it cannot be read, or names what is not served here.
    pub(crate) fn read(file: &Path, versions: &[Version]) -> Result<Self, String> {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{} cannot be read: {error}", file.display()))?;
        Self::parse(&text, versions).map_err(|why| format!("{}: {why}", file.display()))
    }

    fn parse(text: &str, versions: &[Version]) -> Result<Self, String> {
        let said: File = serde_json::from_str(text).map_err(|e| format!("not {{\"MODEL\": {{\"VERSION\": WEIGHT}}}}: {e}"))?;
        let Self(mut weights) = Self::of_the_first(versions);
        for (model, parts) in said {
            let of_model: Vec<&Version> = versions.iter().filter(|version| version.model == model).collect();
            if of_model.is_empty() {
                return Err(format!("model '{model}' is not served here"));
            }
            for version in &of_model {
                weights.insert(version.fingerprint.clone(), 0);
            }
            for (name, weight) in &parts {
                let mut meant = of_model.iter().filter(|version| version.is(name));
                let (Some(version), None) = (meant.next(), meant.next()) else {
                    let here: Vec<String> = of_model.iter().map(|version| version.to_string()).collect();
                    return Err(format!("'{name}' is not one version of model '{model}': {} are", here.join(", ")));
                };
                weights.insert(version.fingerprint.clone(), *weight);
            }
            if parts.values().all(|weight| *weight == 0) {
                return Err(format!("no version of model '{model}' gets anything: give one of them a weight above 0"));
            }
        }
        Ok(Self(weights))
    }

    /// Which of a model's versions gets a request: drawn by weight among those that are `able`, if any is.
    pub(crate) fn draw<'a>(&self, versions: &[&'a Version], able: impl Fn(&Fingerprint) -> bool) -> Option<&'a Version> {
        if let [only] = versions {
            return Some(only);
        }
        let weight = |version: &Version| self.0.get(&version.fingerprint).copied().unwrap_or(0);
        let weighed: Vec<&Version> = versions.iter().copied().filter(|version| weight(version) > 0).collect();
        let able: Vec<&Version> = weighed.iter().copied().filter(|version| able(&version.fingerprint)).collect();
        let among = if able.is_empty() { weighed } else { able };
        among.choose_weighted(&mut rand::rng(), |version| weight(version)).ok().copied()
    }

    /// The version that gets most of them.
    pub(crate) fn most<'a>(&self, versions: &[&'a Version]) -> Option<&'a Version> {
        // Of equals the first.
        versions.iter().copied().rev().max_by_key(|version| self.0.get(&version.fingerprint).copied().unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "aaaaaaaa0";
    const NEW: &str = "aaaaaaaab";

    fn versions() -> Vec<Version> {
        let of = |(model, folder, fingerprint): (&str, &str, &str)| Version {
            model: model.into(),
            folder: folder.into(),
            fingerprint: Fingerprint::new(fingerprint),
        };
        [("m", "v1", OLD), ("m", "v2", NEW), ("other", "o", "cccccccc")].map(of).to_vec()
    }

    fn weights(text: &str) -> Result<[u32; 3], String> {
        let Traffic(weights) = Traffic::parse(text, &versions())?;
        Ok([OLD, NEW, "cccccccc"].map(|fingerprint| weights[&Fingerprint::new(fingerprint)]))
    }

    #[test]
    fn a_file_says_who_gets_what() {
        assert_eq!(weights("{}"), Ok([1, 0, 1]), "the first of each model");
        assert_eq!(weights(r#"{"m": {"v1": 90, "v2": 10}}"#), Ok([90, 10, 1]));
        assert_eq!(weights(r#"{"m": {"v2": 1}}"#), Ok([0, 1, 1]), "who is not named gets nothing");
        assert_eq!(weights(r#"{"m": {"aaaaaaaab": 3}, "other": {"cccccccc": 2}}"#), Ok([0, 3, 2]), "by fingerprint");
        for (wrong, why) in [
            ("[]", "VERSION"),
            (r#"{"m": {"v1": -1}}"#, "VERSION"),
            (r#"{"n": {"v1": 1}}"#, "'n' is not served"),
            (r#"{"m": {"v3": 1}}"#, "'v3' is not one version of model 'm': m@aaaaaaaa0, m@aaaaaaaab are"),
            (r#"{"m": {"aaaaaaaa": 1}}"#, "'aaaaaaaa' is not one version"),
            (r#"{"m": {"aaaaaaa0": 1}}"#, "is not one version"),
            (r#"{"m": {"v1": 0, "v2": 0}}"#, "above 0"),
            (r#"{"m": {}}"#, "above 0"),
        ] {
            let said = weights(wrong).unwrap_err();
            assert!(said.contains(why), "{wrong}: {said}");
        }
    }

    #[test]
    fn requests_are_drawn_by_weight_among_those_that_are_able() {
        let versions = versions();
        let of_model: Vec<&Version> = versions.iter().filter(|version| version.model == "m").collect();
        let traffic = Traffic::parse(r#"{"m": {"v1": 75, "v2": 25}}"#, &versions).unwrap();
        let new = |traffic: &Traffic, able: &[&str]| {
            let able = |fingerprint: &Fingerprint| able.contains(&fingerprint.as_str());
            (0..4000).filter(|_| traffic.draw(&of_model, able).unwrap().folder == "v2").count()
        };
        // Three standard deviations of 4,000 draws are 82.
        for able in [&[OLD, NEW][..], &[]] {
            assert!((900..1100).contains(&new(&traffic, able)), "{able:?}");
        }
        assert_eq!((new(&traffic, &[OLD]), new(&traffic, &[NEW])), (0, 4000));
        let rolled_back = Traffic::parse(r#"{"m": {"v1": 1}}"#, &versions).unwrap();
        assert_eq!(new(&rolled_back, &[NEW]), 0, "one of weight 0 gets nothing, whoever is missing");
        assert_eq!((&*traffic.most(&of_model).unwrap().folder, &*rolled_back.most(&of_model).unwrap().folder), ("v1", "v1"));
        assert!(traffic.draw(&[], |_| true).is_none());
        let only: Vec<&Version> = versions.iter().filter(|version| version.model == "other").collect();
        assert!(traffic.draw(&only, |_| false).is_some(), "who is alone gets all, and tells what is missing");
    }
}
