//! Throughput against frame size, as a chart: one panel for each way, one line for each row. A bar
//! goes from the least to the most of a point's rounds.

use std::fmt::Write;

use super::native::SIZES;
use super::report::Table;

const WIDTH: f64 = 940.0;
const HEIGHT: f64 = 440.0;
/// The corner of the first panel, and the panels' size and distance.
const LEFT: f64 = 60.0;
const TOP: f64 = 70.0;
const PANEL: (f64, f64) = (390.0, 320.0);
const GAP: f64 = 70.0;
const COLOURS: [&str; 8] = [
    "#777777", "#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf",
];
/// How far the bars of two rows are from each other.
const BESIDE: f64 = 4.0;
/// The column of Gbit/s in a flood's table.
const GBITS: usize = 1;
/// Both axes are logarithmic: bytes, and powers of ten of Gbit/s.
const BYTES: (f64, f64) = (45.0, 90_000.0);
const POWERS: (i32, i32) = (-2, 3);

/// The chart of the tables whose titles say that a guest sends or receives on one queue pair.
pub fn chart(tables: &[Table]) -> String {
    let of = |verb: &str, size: usize| {
        let title = format!("guest {verb} {size} B");
        tables.iter().find(move |table| table.title == title)
    };
    let panels = ["sends", "receives"].map(|verb| {
        let sizes = SIZES.iter();
        let sizes = sizes.filter_map(|&size| Some((size, of(verb, size)?)));
        (verb, sizes.collect::<Vec<(usize, &Table)>>())
    });
    let first = panels.iter().find_map(|(_, sizes)| sizes.first());
    let rows: Vec<&str> = first.map_or(Vec::new(), |(_, table)| table.rows().collect());
    let mut chart = Chart(format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    ));
    chart.legend(&rows);
    for (panel, (verb, sizes)) in panels.iter().enumerate() {
        let left = LEFT + panel as f64 * (PANEL.0 + GAP);
        chart.axes(left, &format!("guest {verb}"), sizes);
        for (number, (row, colour)) in rows.iter().zip(COLOURS.iter().cycle()).enumerate() {
            let beside = BESIDE * (number as f64 - (rows.len() as f64 - 1.0) / 2.0);
            chart.line((left, beside), row, colour, sizes);
        }
    }
    chart.0 + "</svg>\n"
}

fn x(left: f64, size: usize) -> f64 {
    left + PANEL.0 * (size as f64 / BYTES.0).ln() / (BYTES.1 / BYTES.0).ln()
}

fn y(gbits: f64) -> f64 {
    let (least, most) = (f64::from(POWERS.0), f64::from(POWERS.1));
    TOP + PANEL.1 * (most - gbits.log10().max(least)) / (most - least)
}

/// What has been drawn so far. Writing to a string cannot fail.
struct Chart(String);

impl Chart {
    fn text(&mut self, at: (f64, f64), anchor: &str, colour: &str, text: &str) {
        let (x, y) = at;
        let _ = writeln!(
            self.0,
            "<text x=\"{x:.0}\" y=\"{y:.0}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{text}</text>"
        );
    }

    fn path(&mut self, path: &str, colour: &str, width: f64) {
        let _ = writeln!(
            self.0,
            "<path d=\"{path}\" stroke=\"{colour}\" stroke-width=\"{width}\" fill=\"none\"/>"
        );
    }

    fn legend(&mut self, rows: &[&str]) {
        let mut left = LEFT;
        for (row, colour) in rows.iter().zip(COLOURS.iter().cycle()) {
            self.path(&format!("M{left:.0} 20 h20"), colour, 2.0);
            self.text((left + 26.0, 24.0), "start", "black", row);
            left += 50.0 + 6.5 * row.len() as f64;
        }
    }

    fn axes(&mut self, left: f64, title: &str, sizes: &[(usize, &Table)]) {
        let bottom = TOP + PANEL.1;
        let title = format!("{title}, Gbit/s by bytes of a frame");
        self.text((left, TOP - 14.0), "start", "black", &title);
        for power in POWERS.0..=POWERS.1 {
            let gbits = 10_f64.powi(power);
            let y = y(gbits);
            self.path(&format!("M{left:.0} {y:.0} h{}", PANEL.0), "#dddddd", 1.0);
            let at = (left - 6.0, y + 4.0);
            self.text(at, "end", "#555555", &gbits.to_string());
        }
        for (size, _) in sizes {
            let x = x(left, *size);
            self.path(&format!("M{x:.0} {bottom:.0} v5"), "#555555", 1.0);
            let at = (x, bottom + 18.0);
            self.text(at, "middle", "#555555", &size.to_string());
        }
    }

    /// The bars stand `beside` their points, so that they don't hide those of other rows.
    fn line(
        &mut self,
        (left, beside): (f64, f64),
        row: &str,
        colour: &str,
        sizes: &[(usize, &Table)],
    ) {
        let mut line = String::new();
        for (size, table) in sizes {
            let Some([least, median, most]) = table.range(row, GBITS) else {
                continue;
            };
            let x = x(left, *size);
            let command = if line.is_empty() { 'M' } else { 'L' };
            let _ = write!(line, "{command}{x:.1} {:.1} ", y(median));
            let bar = format!("M{:.1} {:.1} V{:.1}", x + beside, y(least), y(most));
            self.path(&bar, colour, 3.0);
        }
        self.path(line.trim_end(), colour, 1.5);
    }
}
