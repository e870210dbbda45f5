//! Logs.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// A JSON object a line.
    Json,
}

/// What is logged, and how: flags of every binary.
#[derive(Clone, Debug, clap::Args)]
pub struct LogArgs {
    /// What is logged: a level (error, warn, info, debug, trace), or directives such as `info,overfill_router=debug`
    #[arg(long, env = "OVERFILL_LOG", default_value = "info", global = true)]
    pub log: String,
    /// How log lines look
    #[arg(long, env = "OVERFILL_LOG_FORMAT", value_enum, default_value = "text", global = true)]
    pub log_format: LogFormat,
}

impl LogArgs {
    /// Starts logging to standard error, once a process.
    ///
    /// # Errors
    /// Where the directives are malformed.
    pub fn init(&self) -> Result<(), tracing_subscriber::filter::ParseError> {
        let filter = EnvFilter::try_new(&self.log)?;
        let builder =
            tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal()).with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Text => builder.init(),
            LogFormat::Json => builder.json().init(),
        }
        Ok(())
    }
}
