//! The HTML report: one file, no scripts, nothing loaded from elsewhere; plots are SVG in it. Readable in light and in dark.

mod chart;
mod plots;

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use super::Run;
use super::arrivals::Rate;
use super::summary::{FigureArgs, Metric};
use super::table::percent_word;
use crate::spread::Spread;

const STYLE: &str = include_str!("report.css");

/// Makes the folder that a report goes to, before anything is measured.
///
/// # Errors
/// Where it cannot be made, or the report could not be written.
pub(super) fn prepare(path: &Path) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let opened = std::fs::File::options().append(true).create(true).open(path);
    opened.map(|_| ()).with_context(|| format!("cannot write {}", path.display()))
}

/// Writes the report of these runs; there is at least one.
///
/// # Errors
/// Where the file cannot be written.
pub(super) fn write(path: &Path, runs: &[Run], figures: &FigureArgs) -> anyhow::Result<()> {
    std::fs::write(path, html(runs, figures)).with_context(|| format!("cannot write {}", path.display()))
}

fn html(runs: &[Run], figures: &FigureArgs) -> String {
    let mut page = String::new();
    let plan = &runs[0].plan;
    let title = format!("{} under load", escape(&plan.model));
    page += &format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"><title>{title}</title><style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n"
    );
    let requests: usize = runs.iter().map(|r| r.records.len()).sum();
    page += &format!(
        "<p class=\"sub\">{} at {} · {} data set · {requests} requests in {} · seed {} · {}</p>\n",
        escape(plan.backend),
        escape(&plan.url),
        escape(&plan.dataset),
        if runs.len() == 1 { "one run".into() } else { format!("{} runs", runs.len()) },
        plan.seed,
        escape(&runs[0].date)
    );
    page += &figures_table(runs, figures);
    page += &failures(runs);
    page += &remarks(runs);
    if runs.len() > 1 {
        page += "<h2>Over all rates</h2>\n<div class=\"plots\">\n";
        page += &plots::sweep(runs);
        page += "</div>\n";
    }
    for run in runs {
        page += &format!("<h2>{}</h2>\n<div class=\"plots\">\n", escape(&name(run)));
        page += &plots::of_run(run);
        page += "</div>\n";
    }
    page += &format!("<p class=\"sub\">As it was called: <code>{}</code></p>\n", escape(&plan.command));
    page += "<p class=\"sub\">TTFT, E2EL: to the first and to the last token, from when a request was sent; “from due”: from when it was due. TPOT: time per token without the first. ITL: between one arrival of tokens and the next. Only answered requests have latencies; all others are counted above.</p>\n</body></html>\n";
    page
}

/// What a run is called among others.
fn name(run: &Run) -> String {
    match run.plan.rate {
        Some(Rate::Constant(rate)) if rate.is_infinite() => "All at once".into(),
        Some(Rate::Constant(rate)) => format!("{rate} requests/s"),
        Some(Rate::Ramp { start, end, .. }) => format!("{start} to {end} requests/s"),
        None => "Trace".into(),
    }
}

/// A row for each figure, a column for each run.
fn figures_table(runs: &[Run], figures: &FigureArgs) -> String {
    let mut rows = String::new();
    let mut row = |title: &str, value: &dyn Fn(&Run) -> String| {
        let cells: String = runs.iter().map(|r| format!("<td>{}</td>", value(r))).collect();
        let _ = writeln!(rows, "<tr><th>{}</th>{cells}</tr>", escape(title));
    };
    row("", &|r| escape(&name(r)));
    row("Requests", &|r| r.records.len().to_string());
    row("Answered", &|r| r.summary.completed.to_string());
    row("Failed", &|r| match r.summary.failed {
        0 => "0".into(),
        n => format!("<strong class=\"bad\">{n}</strong>"),
    });
    if runs.iter().any(|r| r.summary.interrupted > 0) {
        row("Interrupted", &|r| r.summary.interrupted.to_string());
    }
    row("Duration, s", &|r| number(r.summary.duration.as_secs_f64()));
    row("Requests/s", &|r| number(r.summary.request_throughput()));
    if !figures.goodput.is_empty() {
        row("Goodput, requests/s", &|r| number(r.summary.goodput.unwrap_or(f64::NAN)));
        row("Goodput from due, requests/s", &|r| number(r.summary.due_goodput.unwrap_or(f64::NAN)));
    }
    row("Tokens read", &|r| r.summary.input_tokens.to_string());
    row("Tokens written", &|r| r.summary.output_tokens.to_string());
    row("Tokens of a prompt, mean (least to most)", &|r| lengths(&r.summary.input_lengths));
    row("Tokens of an answer, mean (least to most)", &|r| lengths(&r.summary.output_lengths));
    row("Tokens written/s", &|r| number(r.summary.per_second(r.summary.output_tokens)));
    row("Most requests at once", &|r| r.summary.peak_concurrency.to_string());
    let mut spread = |title: &str, of: &dyn Fn(&Run) -> Spread| {
        row(&format!("{title} mean, ms"), &|r| number(of(r).mean * 1e3));
        row(&format!("{title} median, ms"), &|r| number(of(r).median() * 1e3));
        // The median is there already.
        for &percent in figures.metric_percentiles.iter().filter(|p| **p != 50.0) {
            row(&format!("{title} p{}, ms", percent_word(percent)), &|r| number(of(r).percentile(percent) * 1e3));
        }
    };
    for metric in [Metric::Ttft, Metric::Tpot, Metric::Itl, Metric::E2el] {
        spread(&metric.name().to_uppercase(), &|r| r.summary.metric(metric).clone());
    }
    spread("TTFT from due", &|r| r.summary.due_ttft.clone());
    spread("E2EL from due", &|r| r.summary.due_e2el.clone());
    spread("Sent late", &|r| r.summary.lateness.clone());
    row("Cores the load tester used", &|r| format!("{} of {}", number(r.summary.health.cores_used), r.summary.health.cores));
    format!("<table>\n{rows}</table>\n")
}

fn failures(runs: &[Run]) -> String {
    let mut rows = String::new();
    for run in runs {
        for failure in &run.summary.failures {
            let (kind, first) = (escape(&failure.kind), escape(&failure.first));
            let _ = writeln!(
                rows,
                "<tr><th>{}</th><td>{kind}</td><td>{}</td><td class=\"text\">{first}</td></tr>",
                escape(&name(run)),
                failure.count
            );
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "<h2>Failed requests</h2>\n<table>\n<tr><th></th><td>kind</td><td>count</td><td class=\"text\">the first of them said</td></tr>\n{rows}</table>\n"
    )
}

fn remarks(runs: &[Run]) -> String {
    let mut items = String::new();
    for run in runs {
        for warning in &run.summary.warnings {
            let _ = writeln!(items, "<li class=\"warning\">{}: {}</li>", escape(&name(run)), escape(warning));
        }
        for note in &run.notes {
            let _ = writeln!(items, "<li>{}: {}</li>", escape(&name(run)), escape(note));
        }
    }
    if items.is_empty() { items } else { format!("<ul>\n{items}</ul>\n") }
}

fn lengths(tokens: &Spread) -> String {
    match (tokens.values().first(), tokens.values().last()) {
        (Some(least), Some(most)) => format!("{} ({least} to {most})", number(tokens.mean)),
        _ => number(f64::NAN),
    }
}

/// A figure with as many places as it is worth.
fn number(value: f64) -> String {
    match value {
        v if v.is_nan() => "–".into(),
        v if v.abs() >= 1000.0 => format!("{v:.0}"),
        v if v.abs() >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// Text as HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_and_texts() {
        assert_eq!([0.1234, 12.345, 1234.5, f64::NAN].map(number), ["0.12", "12.3", "1234", "–"]);
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
