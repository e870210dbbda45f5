//! A look as text, or as the router's own JSON.

use std::io::{self, Write};

use crate::top::columns::{self, HANDOFF, HANDOFF_FIGURES, NODE, NODE_FIGURES};
use crate::top::fetch::Look;

/// Handoffs that are told of.
const HANDOFFS: usize = 8;

/// Writes it to `out`; `speed` in tokens a second, if it is known.
///
/// # Errors
/// Where it cannot be written.
pub(super) fn show(out: &mut impl Write, look: &Look, speed: Option<f64>, json: bool) -> io::Result<()> {
    if json {
        writeln!(out, "{}", look.text.trim_end())?;
        return out.flush();
    }
    let overview = &look.overview;
    let totals = columns::totals(overview, speed).into_iter().map(|(name, value)| format!("{name} {value}")).collect::<Vec<_>>();
    writeln!(out, "{} · {}\n", columns::standing(overview).0, totals.join(" · "))?;
    table(out, NODE, NODE_FIGURES, overview.nodes.iter().map(columns::node))?;
    if !overview.handoffs.is_empty() {
        writeln!(out)?;
        table(out, HANDOFF, HANDOFF_FIGURES, overview.handoffs.iter().take(HANDOFFS).map(columns::handoff))?;
    }
    for (what, n) in columns::errors(overview) {
        writeln!(out, "\n{what}: {n}")?;
    }
    writeln!(out)?;
    out.flush()
}

/// Rows under their heads; columns from `figures` on stand at their right.
fn table<const N: usize>(
    out: &mut impl Write,
    heads: [&str; N],
    figures: usize,
    rows: impl Iterator<Item = [String; N]>,
) -> io::Result<()> {
    let rows: Vec<[String; N]> = [heads.map(str::to_owned)].into_iter().chain(rows).collect();
    let widths: [usize; N] = std::array::from_fn(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    for row in rows {
        let padded = row
            .iter()
            .zip(widths)
            .enumerate()
            .map(|(i, (text, width))| if i < figures { format!("{text:<width$}") } else { format!("{text:>width$}") });
        writeln!(out, "{}", padded.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::columns::tests::overview;

    #[test]
    fn columns_stand_under_each_other() {
        let look = Look { text: "{\"as\":\"it came\"}\n".into(), overview: overview(10.0, 5) };
        let mut out = Vec::new();
        show(&mut out, &look, None, false).unwrap();
        let text = String::from_utf8(out).unwrap();
        let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("role") || line.starts_with("decode")).collect();
        assert_eq!(rows.len(), 3, "{text}");
        let column = |line: &str, what: &str| line.find(what).map(|at| line[..at].chars().count());
        assert_eq!(column(rows[0], "address"), column(rows[1], "10.0.0.7"));
        assert_eq!(column(rows[0], "address"), column(rows[2], "10.0.0.7"));
        assert!(text.contains("ready, 1 node down · answers 3 · waiting 1 · tokens/s –") && text.contains("9.49 MB"), "{text}");

        let mut out = Vec::new();
        show(&mut out, &look, None, true).unwrap();
        assert_eq!(out, b"{\"as\":\"it came\"}\n");
    }
}
