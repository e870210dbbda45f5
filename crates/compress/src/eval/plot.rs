//! An evaluation as a picture: for each task, and for their mean, a bar for each arm with its interval.

use std::fmt::Write;

use crate::eval::report::{Contender, Report};

/// Bars of the arms, in their order; distinguishable in grey too.
const COLOURS: [&str; 6] = ["#0b6e99", "#e8a33d", "#7a7a7a", "#b5446e", "#4c9f70", "#8d6cab"];
const BAR: usize = 18;
const GAP: usize = 22;
const LEFT: usize = 44;
const TOP: usize = 40;
const HEIGHT: usize = 220;

/// The scores as SVG.
pub fn plot(report: &Report) -> String {
    let groups: Vec<&str> = report.samples.keys().map(String::as_str).chain(["mean"]).collect();
    let group = report.arms.len() * BAR + GAP;
    let (width, height) = (LEFT + groups.len() * group + GAP, TOP + HEIGHT + 34);
    let y = |score: f64| TOP as f64 + HEIGHT as f64 * (1.0 - score.clamp(0.0, 1.0));
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let mut put = |line: String| _ = writeln!(svg, "{line}");
    put(format!(r#"<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="11">"#));
    put(format!(r#"<rect width="{width}" height="{height}" fill="white"/>"#));
    for tenth in (0..=10).step_by(2) {
        let (score, at) = (f64::from(tenth) / 10.0, y(f64::from(tenth) / 10.0));
        put(format!(r##"<path d="M{LEFT} {at:.1}H{}" stroke="#dddddd"/>"##, width - GAP));
        put(format!(r#"<text x="{}" y="{:.1}" text-anchor="end">{score:.1}</text>"#, LEFT - 6, at + 4.0));
    }
    let mut legend = LEFT;
    for (arm, Contender { name, .. }) in report.arms.iter().enumerate() {
        put(format!(r#"<rect x="{legend}" y="12" width="11" height="11" fill="{}"/>"#, COLOURS[arm % COLOURS.len()]));
        put(format!(r#"<text x="{}" y="22">{}</text>"#, legend + 16, escaped(name)));
        legend += 36 + 7 * name.chars().count();
    }
    for (i, task) in groups.iter().enumerate() {
        let left = LEFT + GAP / 2 + i * group;
        put(format!(
            r#"<text x="{}" y="{}" text-anchor="middle"{}>{}</text>"#,
            left + (group - GAP) / 2,
            TOP + HEIGHT + 18,
            if *task == "mean" { r#" font-weight="bold""# } else { "" },
            escaped(task)
        ));
        for (arm, contender) in report.arms.iter().enumerate() {
            let score = contender.tasks.get(*task).map_or(contender.mean.score, |figures| figures.score);
            let (x, top) = (left + arm * BAR, y(score.value));
            let colour = COLOURS[arm % COLOURS.len()];
            put(format!(r#"<rect x="{x}" y="{top:.1}" width="{}" height="{:.1}" fill="{colour}"/>"#, BAR - 3, y(0.0) - top));
            let middle = x + BAR / 2 - 1;
            put(format!(r#"<path d="M{middle} {:.1}V{:.1}" stroke="black"/>"#, y(score.low), y(score.high)));
        }
    }
    put("</svg>".into());
    svg
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
