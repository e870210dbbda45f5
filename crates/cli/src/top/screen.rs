//! The screen of `overfill top`.

use std::time::{Duration, Instant};

use anyhow::Context;
use overfill_lifecycle::Drain;
use overfill_router::overview::{Condition, Overview};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style, Stylize};
use ratatui::text::{Line, Span, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Table};
use ratatui::{DefaultTerminal, Frame};

use crate::top::Looks;
use crate::top::columns::{self, HANDOFF, HANDOFF_FIGURES, NODE, NODE_FIGURES, Speed};

/// How long a key, a signal or news may wait for the screen.
const PAUSE: Duration = Duration::from_millis(100);
/// Rows that handoffs get at least, under their heads.
const HANDOFFS: u16 = 5;

/// What is on the screen.
#[derive(Default)]
struct Screen<'a> {
    url: &'a str,
    /// What the router said last, and when.
    last: Option<(Instant, Overview)>,
    speed: Option<f64>,
    /// Why it says nothing now.
    wrong: Option<String>,
}

/// Shows each look until `q`, Ctrl-C or a signal.
///
/// # Errors
/// Where the terminal cannot be used.
pub(super) fn run(url: &str, looks: Looks, ended: &Drain) -> anyhow::Result<()> {
    let mut terminal = ratatui::try_init().context("the terminal cannot be used: try --once")?;
    let watched = watch(&mut terminal, url, looks, ended);
    ratatui::restore();
    watched
}

fn watch(terminal: &mut DefaultTerminal, url: &str, mut looks: Looks, ended: &Drain) -> anyhow::Result<()> {
    let (mut screen, mut speed) = (Screen { url, ..Screen::default() }, Speed::default());
    while !ended.draining() {
        if looks.has_changed().unwrap_or(false) {
            match &*looks.borrow_and_update() {
                Some(Ok(look)) => {
                    screen.speed = speed.of(&look.overview);
                    screen.last = Some((Instant::now(), look.overview.clone()));
                    screen.wrong = None;
                }
                Some(Err(error)) => screen.wrong = Some(format!("{error:#}")),
                None => {}
            }
        }
        terminal.draw(|frame| screen.draw(frame))?;
        if event::poll(PAUSE)? && event::read().is_ok_and(|event| ends(&event)) {
            break;
        }
    }
    Ok(())
}

fn ends(event: &Event) -> bool {
    match event {
        Event::Key(KeyEvent { kind: KeyEventKind::Release, .. }) => false,
        Event::Key(KeyEvent { code: KeyCode::Char('q') | KeyCode::Esc, .. }) => true,
        Event::Key(KeyEvent { code: KeyCode::Char('c'), modifiers, .. }) => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

impl Screen<'_> {
    fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let [head, body, foot] = Layout::vertical([Constraint::Length(3), Constraint::Fill(1), Constraint::Length(1)]).areas(area);
        frame.render_widget(self.head(), head);
        if let Some((_, overview)) = &self.last {
            let errors = columns::errors(overview);
            let nodes = overview.nodes.len() as u16 + 1;
            let wrong = if errors.is_empty() { 0 } else { errors.len() as u16 + 1 };
            let [above, below, at_last] =
                Layout::vertical([Constraint::Max(nodes + 1), Constraint::Min(HANDOFFS), Constraint::Length(wrong)]).areas(body);
            frame.render_widget(nodes_of(overview, above), above);
            frame.render_widget(handoffs_of(overview, below), below);
            let lines: Vec<Line<'_>> = errors.into_iter().map(|(what, n)| Line::from(format!("{what}: {n}"))).collect();
            frame.render_widget(Text::from(lines), at_last);
        }
        frame.render_widget(self.foot(), foot);
    }

    fn head(&self) -> Text<'_> {
        let Some((_, overview)) = &self.last else {
            return Text::from(Line::from(vec!["OverFill ".bold(), Span::raw(self.url)]));
        };
        let (standing, well) = columns::standing(overview);
        let standing = Span::styled(standing, if well { Color::Green } else { Color::Yellow });
        let mut figures = Vec::new();
        for (name, value) in columns::totals(overview, self.speed) {
            figures.extend([value.bold(), Span::raw(format!(" {name}   "))]);
        }
        Text::from(vec![Line::from(vec!["OverFill ".bold(), Span::raw(format!("{}  ", self.url)), standing]), Line::from(figures)])
    }

    fn foot(&self) -> Paragraph<'_> {
        let Some(wrong) = &self.wrong else { return Paragraph::new("q ends".dim()) };
        let since =
            self.last.as_ref().map(|(at, _)| format!("said {} s ago what stands here; ", at.elapsed().as_secs())).unwrap_or_default();
        Paragraph::new(format!("{since}{wrong}; asking on").red())
    }
}

/// Columns of a table: how wide they are, which have figures, and which are left out first where there is no room for all.
struct Columns<const N: usize> {
    heads: [&'static str; N],
    widths: [u16; N],
    figures: usize,
    spare: &'static [usize],
}

/// Address, preempted, to read, prefix hits.
const NODES: Columns<9> = Columns { heads: NODE, widths: [7, 18, 22, 16, 6, 9, 8, 11, 9], figures: NODE_FIGURES, spare: &[2, 8, 6, 7] };
/// Not sent, from cache, took.
const HANDED: Columns<8> = Columns { heads: HANDOFF, widths: [9, 18, 18, 8, 10, 8, 11, 8], figures: HANDOFF_FIGURES, spare: &[5, 4, 7] };

impl<const N: usize> Columns<N> {
    /// Between two columns.
    const SPACE: u16 = 2;

    fn table(&self, rows: impl Iterator<Item = ([String; N], Style)>, width: u16) -> Table<'static> {
        let mut kept: Vec<usize> = (0..N).collect();
        for spare in self.spare {
            let needed: u16 = kept.iter().map(|i| self.widths[*i] + Self::SPACE).sum();
            if needed.saturating_sub(Self::SPACE) > width {
                kept.retain(|i| i != spare);
            }
        }
        let row = |texts: [String; N]| {
            let cells = kept.iter().map(|i| {
                let side = if *i < self.figures { Alignment::Left } else { Alignment::Right };
                Cell::from(Text::from(texts[*i].clone()).alignment(side))
            });
            Row::new(cells.collect::<Vec<_>>())
        };
        let heads = row(self.heads.map(str::to_owned)).dim();
        let rows: Vec<Row<'_>> = rows.map(|(texts, style)| row(texts).style(style)).collect();
        Table::new(rows, kept.iter().map(|i| Constraint::Max(self.widths[*i]))).header(heads).column_spacing(Self::SPACE)
    }
}

fn nodes_of(overview: &Overview, area: Rect) -> Table<'static> {
    let rows = overview.nodes.iter().map(|node| {
        let style = match node.condition {
            condition if condition.is_down() => Style::new().fg(Color::Red).add_modifier(Modifier::BOLD),
            Condition::Suspected | Condition::Draining => Style::new().fg(Color::Yellow),
            Condition::Left | Condition::New | Condition::Starting => Style::new().add_modifier(Modifier::DIM),
            _ => Style::new(),
        };
        (columns::node(node), style)
    });
    NODES.table(rows, area.width)
}

fn handoffs_of(overview: &Overview, area: Rect) -> Table<'static> {
    let most = usize::from(area.height.saturating_sub(1));
    HANDED.table(overview.handoffs.iter().take(most).map(|handoff| (columns::handoff(handoff), Style::new())), area.width)
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::top::columns::tests::overview;

    fn drawn(screen: &Screen<'_>) -> Vec<String> {
        drawn_on(screen, 124)
    }

    fn drawn_on(screen: &Screen<'_>, width: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, 20)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        buffer.content.chunks(usize::from(width)).map(|line| line.iter().map(|cell| cell.symbol()).collect()).collect()
    }

    #[test]
    fn the_cluster_is_drawn_and_stays_where_the_router_goes_away() {
        let mut screen = Screen { url: "http://r:1", ..Screen::default() };
        assert!(drawn(&screen)[0].contains("http://r:1"));
        screen.last = Some((Instant::now(), overview(10.0, 5)));
        let lines = drawn(&screen);
        let has = |lines: &[String], words: &[&str]| lines.iter().any(|line| words.iter().all(|word| line.contains(word)));
        assert!(has(&lines, &["ready, 1 node down"]) && has(&lines, &["decode-455af6cd", "ready", "25 %", "3/64"]), "{lines:#?}");
        assert!(has(&lines, &["decode-far", "lost 12 s ago"]) && has(&lines, &["prefill-a", "412", "9.49 MB", "38 ms"]), "{lines:#?}");
        assert!(has(&lines, &["attempt failed: node lost: 5"]) && has(&lines, &["q ends"]), "{lines:#?}");
        let narrow = drawn_on(&screen, 80);
        assert!(has(&narrow, &["decode-far", "lost 12 s ago"]) && has(&narrow, &["decode-455af6cd", "25 %", "3/64"]), "{narrow:#?}");
        assert!(!has(&narrow, &["10.0.0.7"]) && has(&narrow, &["prefill-a", "decode-far", "9.49 MB"]), "{narrow:#?}");
        screen.wrong = Some("no router answers at http://r:1".into());
        let lines = drawn(&screen);
        assert!(has(&lines, &["no router answers at http://r:1; asking on"]) && has(&lines, &["decode-455af6cd"]), "{lines:#?}");
    }

    #[test]
    fn a_few_keys_end_it() {
        let key = |code, modifiers| Event::Key(KeyEvent::new(code, modifiers));
        assert!(ends(&key(KeyCode::Char('q'), KeyModifiers::NONE)) && ends(&key(KeyCode::Char('c'), KeyModifiers::CONTROL)));
        assert!(!ends(&key(KeyCode::Char('c'), KeyModifiers::NONE)) && !ends(&Event::Resize(80, 24)));
    }
}
