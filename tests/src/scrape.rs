//! A server's metrics, read strictly: every sample has a help text and a type before it.

use std::collections::BTreeMap;

/// One answer of `/metrics`.
#[derive(Debug)]
pub struct Scrape {
    samples: Vec<Sample>,
    /// Metric to its type.
    pub types: BTreeMap<String, String>,
    /// Metric to its help text.
    pub help: BTreeMap<String, String>,
}

#[derive(Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Scrape {
    /// Asks `url`.
    pub async fn of(url: &str) -> Self {
        let answer = reqwest::get(url).await.unwrap();
        assert_eq!(answer.status(), 200);
        assert!(answer.headers()["content-type"].to_str().unwrap().starts_with("text/plain; version=0.0.4"), "{:?}", answer.headers());
        Self::parse(&answer.text().await.unwrap())
    }

    /// Of such an answer's text.
    pub fn parse(text: &str) -> Self {
        let mut scrape = Self { samples: Vec::new(), types: BTreeMap::new(), help: BTreeMap::new() };
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                scrape.help.insert(name.into(), help.into());
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(scrape.types.insert(name.into(), kind.into()).is_none(), "{name} comes twice");
            } else {
                let sample = sample(line);
                let family = ["_bucket", "_sum", "_count"].iter().find_map(|end| sample.name.strip_suffix(end));
                let family = family.filter(|f| scrape.types.get(*f).is_some_and(|kind| kind == "histogram")).unwrap_or(&sample.name);
                assert!(scrape.types.contains_key(family) && scrape.help.contains_key(family), "{line} has no type or no help");
                scrape.samples.push(sample);
            }
        }
        scrape
    }

    /// The samples of this name and these labels (there may be others), summed; 0 if there are none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |s: &&Sample| s.name == name && labels.iter().all(|(k, v)| s.labels.get(*k).is_some_and(|got| got == v));
        self.samples.iter().filter(has).map(|s| s.value).sum()
    }

    /// Whether there is such a sample.
    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|s| s.name == name)
    }

    /// Upper ends of a histogram's buckets but the last, which is infinite.
    pub fn buckets(&self, name: &str) -> Vec<f64> {
        let name = format!("{name}_bucket");
        let mut ends: Vec<f64> = self.samples.iter().filter(|s| s.name == name).map(|s| s.labels["le"].parse().unwrap()).collect();
        ends.sort_by(f64::total_cmp);
        ends.dedup();
        assert_eq!(ends.pop(), Some(f64::INFINITY), "{name}");
        ends
    }

    /// All values of a label.
    pub fn values(&self, label: &str) -> Vec<&str> {
        let mut values: Vec<&str> = self.samples.iter().filter_map(|s| s.labels.get(label)).map(String::as_str).collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    /// Names of all labels.
    pub fn labels(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.samples.iter().flat_map(|s| s.labels.keys()).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// `name{label="value",…} value`; values of our labels have no quotes in them.
fn sample(line: &str) -> Sample {
    let (what, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
    let (name, labels) = match what.split_once('{') {
        Some((name, labels)) => (name, labels.strip_suffix('}').unwrap_or_else(|| panic!("{line}"))),
        None => (what, ""),
    };
    assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':'), "{line}");
    let labels = labels.split_terminator("\",").map(|label| {
        let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
        (key.to_owned(), value.trim_end_matches('"').to_owned())
    });
    Sample { name: name.into(), labels: labels.collect(), value: value.parse().unwrap_or_else(|_| panic!("{line}")) }
}
