//! How the flags of every binary are read.

use std::ffi::OsStr;

use clap::builder::FalseyValueParser;
use clap::{Arg, ArgAction, Command, Parser};

/// Reads the flags of this process and the environment that they name. An empty variable is as good as none, as where manifests
/// leave a value out; for a flag without a value, `1`, `true`, `yes` and `on` set it, `0`, `false`, `no` and `off` do not.
/// Ends the process where they are wrong, or help was asked for.
pub fn parse<P: Parser>() -> P {
    let matches = lenient(P::command(), |name| std::env::var_os(name).is_some_and(|value| value.is_empty())).get_matches();
    P::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
}

fn lenient(command: Command, empty: impl Fn(&OsStr) -> bool + Copy) -> Command {
    let lenient_arg = |arg: Arg| {
        let arg = match arg.get_env() {
            Some(name) if empty(name) => arg.env(None::<&'static str>),
            _ => arg,
        };
        let is_flag = matches!(arg.get_action(), ArgAction::SetTrue);
        if is_flag { arg.value_parser(FalseyValueParser::new()) } else { arg }
    };
    command.mut_args(lenient_arg).mut_subcommands(|command| lenient(command, empty))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, FromArgMatches};

    use super::*;

    #[derive(Parser)]
    struct Flags {
        // A variable that every process has, and one that none has.
        #[arg(long, env = "PATH")]
        path: Option<String>,
        #[arg(long, env = "CARGO_MANIFEST_DIR")]
        json: bool,
        #[arg(long)]
        quiet: bool,
    }

    fn read(empty: &[&str]) -> Flags {
        let matches = lenient(Flags::command(), |name| empty.iter().any(|e| *e == name)).get_matches_from(["flags"]);
        Flags::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn empty_is_unset_and_any_word_of_consent_sets() {
        let Flags { path, json, quiet } = read(&[]);
        assert!(path.is_some() && json && !quiet, "a path is no `bool`, and sets the flag all the same");
        let Flags { path, json, .. } = read(&["PATH", "CARGO_MANIFEST_DIR"]);
        assert!(path.is_none() && !json);
    }
}
