//! The blackout as a picture: one line per phase, its bar where it was in time.

use pclive_tests::pclive::Phase;

/// Columns of the whole time.
const WIDTH: i64 = 60;

/// Draws the phases, a line each.
pub fn draw(phases: &[Phase]) -> String {
    let start_us = phases.iter().map(|phase| phase.start_us).min().unwrap_or_default();
    let end_us = phases.iter().map(|phase| phase.start_us + phase.duration_us).max().unwrap_or_default();
    let span_us = (end_us - start_us).max(1);
    let column = |us: i64| (us - start_us) * WIDTH / span_us;
    let name_width = phases.iter().map(|phase| phase.name.len()).max().unwrap_or_default();
    let mut picture = String::new();
    for phase in phases {
        let first = column(phase.start_us).min(WIDTH - 1);
        // Even the shortest phase is seen.
        let last = column(phase.start_us + phase.duration_us).max(first + 1);
        let bar = "█".repeat((last - first) as usize);
        let blank = " ".repeat(first as usize);
        let rest = " ".repeat((WIDTH - last) as usize);
        let (name, side, ms) = (&phase.name, &phase.side, phase.duration_us as f64 / 1e3);
        picture += &format!("  {side:<11} {name:<name_width$} ▕{blank}{bar}{rest}▏{ms:>9.2} ms\n");
    }
    picture
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_where_their_phases_were() {
        let phase = |name: &str, start_us, duration_us| Phase {
            name: name.into(),
            side: "source".into(),
            start_us,
            duration_us,
        };
        let picture = draw(&[phase("freeze", 1_000, 500), phase("send", 1_500, 500), phase("go", 2_000, 0)]);
        let bars: Vec<_> =
            picture.lines().map(|line| line.split(['▕', '▏']).nth(1).expect("a bar")).collect();
        assert_eq!(bars[0], format!("{}{}", "█".repeat(30), " ".repeat(30)));
        assert_eq!(bars[1], format!("{}{}", " ".repeat(30), "█".repeat(30)));
        assert_eq!(bars[2], format!("{}█", " ".repeat(59)));
        assert!(picture.lines().next().expect("a line").ends_with("0.50 ms"));
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        assert_eq!(draw(&[]), "");
    }
}
