//! A metric whose value is kept elsewhere and read at each scrape.

use prometheus::core::{Collector, Desc};
use prometheus::proto::MetricFamily;
use prometheus::{Counter, Error, Gauge, Opts};

pub(super) enum Kind {
    Counter,
    Gauge,
}

pub(super) struct ReadAtScrape<F> {
    kind: Kind,
    opts: Opts,
    desc: Desc,
    read: F,
}

impl<F: Fn() -> f64> ReadAtScrape<F> {
    /// # Errors
    /// Where the name or a label is malformed.
    pub(super) fn new(kind: Kind, opts: Opts, read: F) -> Result<Self, Error> {
        let desc = Desc::new(opts.fq_name(), opts.help.clone(), Vec::new(), opts.const_labels.clone())?;
        Ok(Self { kind, opts, desc, read })
    }

    fn now(&self) -> Result<Vec<MetricFamily>, Error> {
        let value = (self.read)();
        Ok(match self.kind {
            Kind::Counter => {
                let counter = Counter::with_opts(self.opts.clone())?;
                counter.inc_by(value);
                counter.collect()
            }
            Kind::Gauge => {
                let gauge = Gauge::with_opts(self.opts.clone())?;
                gauge.set(value);
                gauge.collect()
            }
        })
    }
}

impl<F: Fn() -> f64 + Send + Sync> Collector for ReadAtScrape<F> {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        // Its name and labels were checked when it was made.
        self.now().unwrap_or_default()
    }
}
