//! Throughput against frame size, as a chart: one panel for each way, one line for each row.

use std::fmt::Write;

use super::native::SIZES;
use super::report::Table;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 420.0;
const MARGIN: f64 = 60.0;
const PANEL: f64 = 360.0;
const COLOURS: [&str; 8] = [
    "#888888", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf",
];
/// The column of Gbit/s in a flood's table.
const GBITS: usize = 1;

/// The chart of the tables whose titles say that a guest sends or receives on one queue pair.
pub fn chart(tables: &[Table]) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let of = |verb: &str, size: usize| {
        let title = format!("guest {verb} {size} B");
        tables.iter().find(move |table| table.title == title)
    };
    for (panel, verb) in ["sends", "receives"].into_iter().enumerate() {
        let sizes = SIZES
            .iter()
            .filter_map(|&size| Some((size, of(verb, size)?)));
        let sizes: Vec<(usize, &Table)> = sizes.collect();
        let left = MARGIN + panel as f64 * (PANEL + MARGIN);
        draw(&mut svg, left, &format!("guest {verb}, Gbit/s"), &sizes);
    }
    svg + "</svg>\n"
}

/// Both axes are logarithmic: 50 B to 100 kB, 0.01 to 1000 Gbit/s.
fn draw(svg: &mut String, left: f64, title: &str, sizes: &[(usize, &Table)]) {
    let bottom = HEIGHT - MARGIN;
    let x = |size: usize| left + PANEL * (size as f64 / 50.0).log10() / 2000_f64.log10();
    let y = |gbits: f64| bottom - (HEIGHT - 2.0 * MARGIN) * (gbits / 0.01).log10() / 5.0;
    let mut text = |x: f64, y: f64, anchor: &str, colour: &str, text: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(
            svg,
            "<text x=\"{x:.0}\" y=\"{y:.0}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
        );
    };
    text(left, MARGIN - 24.0, "start", "black", title);
    for power in -2..=3 {
        let gbits = 10_f64.powi(power);
        text(
            left - 4.0,
            y(gbits) + 4.0,
            "end",
            "#555555",
            &gbits.to_string(),
        );
    }
    for (size, _) in sizes {
        text(
            x(*size),
            bottom + 16.0,
            "middle",
            "#555555",
            &size.to_string(),
        );
    }
    let rows: Vec<&str> = sizes
        .first()
        .map_or(Vec::new(), |(_, table)| table.rows().collect());
    for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        let place = rows.iter().position(|name| name == row).unwrap_or(0) as f64;
        text(left + 8.0, MARGIN + 14.0 * place, "start", colour, row);
    }
    for power in -2..=3 {
        let y = y(10_f64.powi(power));
        let _ = writeln!(
            svg,
            "<path d=\"M{left:.0} {y:.0} h{PANEL}\" stroke=\"#dddddd\" fill=\"none\"/>"
        );
    }
    for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
        let points = sizes.iter().filter_map(|(size, table)| {
            let gbits = table.median(row, GBITS).filter(|gbits| *gbits > 0.0)?;
            Some(format!("{:.1},{:.1}", x(*size), y(gbits)))
        });
        let points = points.collect::<Vec<_>>().join(" ");
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" stroke=\"{colour}\" stroke-width=\"2\" fill=\"none\"/>"
        );
    }
}
