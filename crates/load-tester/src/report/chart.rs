//! Charts as SVG: lines, bars and marks over two axes. Just what the report needs.

use std::fmt::Write;

use super::escape;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 310.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 44.0;

/// A chart; nothing is drawn of one that has no point.
pub(super) struct Chart {
    title: &'static str,
    x: Axis,
    y: Axis,
    layers: Vec<Layer>,
}

/// One direction.
pub(super) struct Axis {
    label: &'static str,
    /// Powers of ten at even distances.
    log: bool,
}

struct Layer {
    /// Empty: not in the legend.
    name: String,
    /// A CSS colour.
    colour: String,
    points: Vec<(f64, f64)>,
    shape: Shape,
}

enum Shape {
    /// With a mark at each point.
    Line { marks: bool },
    /// From the axis up; each as wide as the distance to the next x, the last as the one before.
    Bars,
}

impl Axis {
    pub(super) fn linear(label: &'static str) -> Self {
        Self { label, log: false }
    }

    pub(super) fn log(label: &'static str) -> Self {
        Self { label, log: true }
    }
}

/// What lies on an axis, and where.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let (mut low, mut high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
        if axis.log {
            // At least from a power of ten to a bit above it, so that there is something to read.
            low = low.max(1e-9);
            high = high.max(low * 2.0);
        } else {
            low = low.min(0.0);
            if high <= low {
                high = low + 1.0;
            }
        }
        Self { log: axis.log, low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        let share = if self.log {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + (self.to - self.from) * share
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log { self.log_ticks() } else { self.linear_ticks() }
    }

    /// Four to eight round numbers.
    fn linear_ticks(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|f| f * power).into_iter().find(|s| *s >= rough).unwrap_or(power);
        let first = (self.low / step).ceil() as i64;
        (first..).map(|i| i as f64 * step).take_while(|t| *t <= self.high * (1.0 + 1e-9)).collect()
    }

    /// 1, 2 and 5 times powers of ten, fewer where the range is wide; round numbers at even distances where it is narrow.
    fn log_ticks(&self) -> Vec<f64> {
        let decades = (self.high / self.low).log10();
        if decades < 0.7 {
            return self.linear_ticks();
        }
        let factors: &[f64] = if decades > 3.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let all = (first..=last).flat_map(|power| factors.iter().map(move |f| f * 10f64.powi(power)));
        all.filter(|t| (self.low * (1.0 - 1e-9)..=self.high * (1.0 + 1e-9)).contains(t)).collect()
    }
}

/// A tick's number, without what it does not need.
fn label(value: f64) -> String {
    if value != 0.0 && (value.abs() >= 1e6 || value.abs() < 1e-3) {
        // Three places: more are those of binary fractions.
        let text = format!("{value:.2e}");
        let Some((digits, power)) = text.split_once('e') else { return text };
        return format!("{}e{power}", digits.trim_end_matches('0').trim_end_matches('.'));
    }
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

impl Chart {
    pub(super) fn new(title: &'static str, x: Axis, y: Axis) -> Self {
        Self { title, x, y, layers: Vec::new() }
    }

    pub(super) fn line(self, name: impl Into<String>, colour: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.layer(name, colour, points, Shape::Line { marks: false })
    }

    pub(super) fn marked_line(self, name: impl Into<String>, colour: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.layer(name, colour, points, Shape::Line { marks: true })
    }

    pub(super) fn bars(self, name: impl Into<String>, colour: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.layer(name, colour, points, Shape::Bars)
    }

    fn layer(mut self, name: impl Into<String>, colour: impl Into<String>, mut points: Vec<(f64, f64)>, shape: Shape) -> Self {
        points.retain(|(x, y)| x.is_finite() && y.is_finite());
        self.layers.push(Layer { name: name.into(), colour: colour.into(), points, shape });
        self
    }

    pub(super) fn svg(&self) -> String {
        let points = || self.layers.iter().flat_map(|l| &l.points);
        if points().next().is_none() {
            return String::new();
        }
        let widest = self.layers.iter().filter(|l| matches!(l.shape, Shape::Bars)).flat_map(|l| ends(&l.points, self.x.log));
        let x = Scale::new(&self.x, points().map(|p| p.0).chain(widest), LEFT, WIDTH - RIGHT);
        let y = Scale::new(&self.y, points().map(|p| p.1), HEIGHT - BOTTOM, TOP);
        let mut svg = format!(
            "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\"><text class=\"title\" x=\"0\" y=\"16\">{title}</text>",
            title = escape(self.title)
        );
        self.legend(&mut svg);
        for tick in y.ticks() {
            let at = y.at(tick);
            let _ = write!(
                svg,
                "<path class=\"axis\" d=\"M{LEFT} {at:.1}H{:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 6.0,
                at + 4.0,
                label(tick)
            );
        }
        for tick in x.ticks() {
            let at = x.at(tick);
            let _ = write!(
                svg,
                "<path class=\"axis\" d=\"M{at:.1} {:.1}v5\"/><text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                HEIGHT - BOTTOM,
                HEIGHT - BOTTOM + 18.0,
                label(tick)
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
            WIDTH - RIGHT,
            HEIGHT - 8.0,
            escape(self.x.label),
            0.0,
            TOP - 12.0,
            escape(self.y.label)
        );
        for layer in &self.layers {
            layer.draw(&mut svg, &x, &y);
        }
        svg += "</svg></figure>\n";
        svg
    }

    fn legend(&self, svg: &mut String) {
        let mut at = 0.0;
        for layer in self.layers.iter().filter(|l| !l.name.is_empty()) {
            let _ = write!(
                svg,
                "<rect x=\"{at:.1}\" y=\"27\" width=\"14\" height=\"4\" rx=\"2\" style=\"fill:{}\"/><text x=\"{:.1}\" y=\"33\">{}</text>",
                layer.colour,
                at + 19.0,
                escape(&layer.name)
            );
            // Near enough: no font is measured here.
            at += 32.0 + 6.8 * layer.name.chars().count() as f64;
        }
    }
}

/// Where each bar ends.
fn ends(points: &[(f64, f64)], log: bool) -> Vec<f64> {
    let mut ends: Vec<f64> = points.iter().skip(1).map(|p| p.0).collect();
    ends.extend(match points {
        [.., (before, _), (last, _)] => Some(if log { last * last / before } else { last + last - before }),
        [(only, _)] => Some(if log { only * 2.0 } else { only + 1.0 }),
        [] => None,
    });
    ends
}

impl Layer {
    fn draw(&self, svg: &mut String, x: &Scale, y: &Scale) {
        match self.shape {
            Shape::Line { marks } => {
                let path: Vec<String> = self.points.iter().map(|&(px, py)| format!("{:.1} {:.1}", x.at(px), y.at(py))).collect();
                let _ = write!(svg, "<path class=\"line\" style=\"stroke:{}\" d=\"M{}\"/>", self.colour, path.join("L"));
                // A line of one point is invisible without its mark.
                if marks || self.points.len() == 1 {
                    for &(px, py) in &self.points {
                        let told = format!("{} {}: {}", self.name, label(px), label(py));
                        let _ = write!(
                            svg,
                            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" style=\"fill:{}\"><title>{}</title></circle>",
                            x.at(px),
                            y.at(py),
                            self.colour,
                            escape(&told)
                        );
                    }
                }
            }
            Shape::Bars => {
                for (&(px, py), end) in self.points.iter().zip(ends(&self.points, x.log)) {
                    let (left, top) = (x.at(px), y.at(py));
                    let width = (x.at(end) - left - 1.0).max(0.5);
                    let told = format!("{} to {}: {}", label(px), label(end), label(py));
                    let _ = write!(
                        svg,
                        "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{:.1}\" style=\"fill:{}\"><title>{}</title></rect>",
                        HEIGHT - BOTTOM - top,
                        self.colour,
                        escape(&told)
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_on_the_axis() {
        for (low, high) in [(0.0, 1.0), (0.0, 7.3), (0.0, 950.0), (0.0, 12_345.0), (0.0, 0.0021)] {
            let scale = Scale::new(&Axis::linear(""), [low, high].into_iter(), 0.0, 100.0);
            let ticks = scale.ticks();
            assert!((3..=7).contains(&ticks.len()), "{high}: {ticks:?}");
            assert!(ticks.iter().all(|t| (0.0..=100.0 + 1e-6).contains(&scale.at(*t))));
        }
        let scale = Scale::new(&Axis::log(""), [0.5, 800.0].into_iter(), 0.0, 100.0);
        assert_eq!(scale.ticks(), [1.0, 10.0, 100.0]);
        for (low, high) in [(38.2, 41.0), (6.1, 8.3), (21.0, 49.0), (0.000_31, 0.000_62)] {
            let scale = Scale::new(&Axis::log(""), [low, high].into_iter(), 0.0, 100.0);
            assert!((2..=9).contains(&scale.ticks().len()), "{low} to {high}: {:?}", scale.ticks());
        }
        assert_eq!([0.000_060_000_000_000_000_01, 1.2e7, 0.25, 1000.0].map(label), ["6e-5", "1.2e7", "0.25", "1000"]);
        assert!((scale.at(0.5), scale.at(800.0)) == (0.0, 100.0));
    }

    #[test]
    fn nothing_breaks_a_chart() {
        let chart = |points: Vec<(f64, f64)>| {
            Chart::new("t", Axis::log("x"), Axis::linear("y")).bars("", "red", points.clone()).line("<&>", "blue", points).svg()
        };
        assert_eq!(chart(vec![]), "");
        assert_eq!(chart(vec![(f64::NAN, 1.0)]), "");
        for points in [vec![(1.0, 0.0)], vec![(0.0, 5.0)], vec![(3.0, 3.0), (3.0, 3.0)], vec![(1.0, f64::INFINITY), (2.0, 1.0)]] {
            let svg = chart(points);
            assert!(svg.contains("&lt;&amp;&gt;") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }
}
