//! A run's loss as a picture: SVG, written by hand, since it is a few lines and some numbers.

use std::fmt::Write;

use crate::log::Record;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
/// Left, top, right, bottom.
const MARGIN: [f64; 4] = [56.0, 28.0, 16.0, 44.0];
/// Points of the training loss's line; each is the mean of as many steps.
const POINTS: usize = 200;

/// A named line.
struct Line {
    name: &'static str,
    colour: &'static str,
    points: Vec<(f64, f64)>,
    marked: bool,
}

/// Training and validation loss over response tokens.
pub fn svg(records: &[Record]) -> String {
    let mut tokens = 0.0;
    let mut trained = Vec::new();
    let (mut loss, mut ce) = (Vec::new(), Vec::new());
    for record in records {
        match record {
            Record::Step(step) => {
                tokens += step.tokens as f64;
                trained.push((tokens, step.loss));
            }
            Record::Validation(validation) => {
                loss.push((tokens, validation.loss));
                ce.push((tokens, validation.ce));
            }
        }
    }
    let each = trained.len().div_ceil(POINTS).max(1);
    let mean = |part: &[(f64, f64)]| (part[part.len() - 1].0, part.iter().map(|p| p.1).sum::<f64>() / part.len() as f64);
    let trained = trained.chunks(each).map(mean).collect();
    let mut lines = vec![Line { name: "training loss", colour: "#9ab", points: trained, marked: false }];
    if loss != ce {
        lines.push(Line { name: "validation loss", colour: "#06c", points: loss, marked: true });
    }
    lines.push(Line { name: "validation cross-entropy", colour: "#c40", points: ce, marked: true });
    draw(&lines)
}

fn draw(lines: &[Line]) -> String {
    let points = || lines.iter().flat_map(|l| &l.points).filter(|p| p.1.is_finite());
    let most = points().map(|p| p.0).fold(1.0, f64::max);
    let (low, high) = points().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), p| (low.min(p.1), high.max(p.1)));
    let (low, high) = if low < high { (low, high) } else { (low.min(0.0), low.min(0.0) + 1.0) };
    let [left, top, right, bottom] = MARGIN;
    let x = |tokens: f64| left + tokens / most * (WIDTH - left - right);
    let y = |loss: f64| top + (high - loss) / (high - low) * (HEIGHT - top - bottom);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    // Writing to a string does not fail.
    for at in 0..=4 {
        let (loss, tokens) = (low + (high - low) * f64::from(at) / 4.0, most * f64::from(at) / 4.0);
        let _ = writeln!(
            svg,
            "<path d=\"M{left} {y:.1}H{end}\" stroke=\"#ddd\"/><text x=\"{label}\" y=\"{text:.1}\" text-anchor=\"end\">{loss:.2}</text>",
            y = y(loss),
            end = WIDTH - right,
            label = left - 6.0,
            text = y(loss) + 4.0
        );
        let (x, below) = (x(tokens), HEIGHT - bottom + 18.0);
        let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{below}\" text-anchor=\"middle\">{:.0}</text>", tokens / 1000.0);
    }
    let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">thousand response tokens</text>", WIDTH / 2.0, HEIGHT - 8.0);
    for (i, line) in lines.iter().enumerate() {
        let finite = || line.points.iter().filter(|p| p.1.is_finite());
        let path: Vec<String> = finite().map(|p| format!("{:.1} {:.1}", x(p.0), y(p.1))).collect();
        let colour = line.colour;
        if !path.is_empty() {
            let _ = writeln!(svg, "<path d=\"M{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"/>", path.join("L"));
        }
        for p in finite().filter(|_| line.marked) {
            let _ = writeln!(svg, "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"2.5\" fill=\"{colour}\"/>", x(p.0), y(p.1));
        }
        let at = left + 10.0 + 200.0 * i as f64;
        let _ = writeln!(svg, "<text x=\"{at}\" y=\"16\" fill=\"{colour}\">{}, nats a token</text>", line.name);
    }
    svg + "</svg>\n"
}
