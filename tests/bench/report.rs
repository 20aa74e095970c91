//! What the bench shows: tables, as text and as JSON.

use serde_json::{Value, json};

/// A column's name, and how many decimals make sense.
pub type Column = (&'static str, usize);

/// Rows that are compared, each measured several times.
#[derive(Debug)]
pub struct Table {
    /// What is measured.
    pub title: String,
    columns: Vec<(String, usize)>,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    name: String,
    /// For each column what was measured, round by round; nothing where it cannot be had.
    cells: Vec<Vec<f64>>,
}

impl Table {
    /// An empty table.
    pub fn new(title: impl Into<String>, columns: &[Column]) -> Self {
        let columns = columns.iter();
        Self {
            title: title.into(),
            columns: columns
                .map(|&(name, decimals)| (name.to_owned(), decimals))
                .collect(),
            rows: Vec::new(),
        }
    }

    /// Adds one round's figures to a row, in the order of the columns.
    pub fn add(&mut self, row: &str, figures: &[Option<f64>]) {
        assert_eq!(figures.len(), self.columns.len(), "{}", self.title);
        let place = self.rows.iter().position(|known| known.name == row);
        let place = place.unwrap_or_else(|| {
            self.rows.push(Row {
                name: row.to_owned(),
                cells: vec![Vec::new(); figures.len()],
            });
            self.rows.len() - 1
        });
        for (cell, figure) in self.rows[place].cells.iter_mut().zip(figures) {
            cell.extend(figure.filter(|figure| figure.is_finite()));
        }
    }

    /// Adds a column: a column's medians as multiples of the largest among the rows whose name
    /// begins so. It stays empty without such a row, and where that is 0.
    pub fn add_ratio(&mut self, name: &str, column: usize, reference: &str) {
        let of = |row: &Row| median(&row.cells[column]);
        let rows = self.rows.iter();
        let references = rows.filter(|row| row.name.starts_with(reference));
        let best = references.filter_map(of).max_by(f64::total_cmp);
        let best = best.filter(|&best| best > 0.0);
        for row in &mut self.rows {
            let ratio = best.and_then(|best| Some(of(row)? / best));
            row.cells.push(ratio.into_iter().collect());
        }
        self.columns.push((name.to_owned(), 2));
    }

    /// Adds a column: each row's median as a multiple of that of the row which `reference` names for
    /// it.
    pub fn add_ratio_to(&mut self, name: &str, column: usize, reference: impl Fn(&str) -> String) {
        let ratio = |row: &Row| {
            let [_, against, _] = self.range(&reference(&row.name), column)?;
            Some(median(&row.cells[column])? / against)
        };
        let ratios: Vec<Option<f64>> = self.rows.iter().map(ratio).collect();
        for (row, ratio) in self.rows.iter_mut().zip(ratios) {
            row.cells.push(ratio.into_iter().collect());
        }
        self.columns.push((name.to_owned(), 2));
    }

    /// The least, the median and the most of a row's column.
    pub fn range(&self, row: &str, column: usize) -> Option<[f64; 3]> {
        let row = self.rows.iter().find(|known| known.name == row)?;
        range(&row.cells[column])
    }

    /// The rows' names.
    pub fn rows(&self) -> impl Iterator<Item = &str> {
        self.rows.iter().map(|row| row.name.as_str())
    }

    /// Medians, with the least and the most where it was measured more than once.
    pub fn print(&self) {
        let header = std::iter::once(self.title.clone());
        let header = header.chain(self.columns.iter().map(|(name, _)| name.clone()));
        let lines = self.rows.iter().map(|row| {
            let cells = row.cells.iter().zip(&self.columns);
            let cells = cells.map(|(cell, (_, decimals))| text(cell, *decimals));
            std::iter::once(row.name.clone()).chain(cells).collect()
        });
        let lines: Vec<Vec<String>> = std::iter::once(header.collect()).chain(lines).collect();
        let width = |column: usize| lines.iter().map(|line| line[column].len()).max();
        let widths: Vec<usize> = (0..=self.columns.len()).filter_map(width).collect();
        println!();
        for line in &lines {
            print!("{:<1$}", line[0], widths[0]);
            let cells = line.iter().zip(&widths).skip(1);
            cells.for_each(|(cell, width)| print!("  {cell:>width$}"));
            println!();
        }
    }

    /// All that was measured.
    pub fn json(&self) -> Value {
        let rows = self.rows.iter().map(|row| {
            let cells = row.cells.iter().zip(&self.columns);
            let cells = cells.map(|(cell, (name, _))| {
                let value = json!({"median": median(cell), "rounds": cell});
                (name.clone(), value)
            });
            (row.name.clone(), Value::Object(cells.collect()))
        });
        json!({"title": self.title, "rows": Value::Object(rows.collect())})
    }
}

fn median(values: &[f64]) -> Option<f64> {
    range(values).map(|[_, median, _]| median)
}

/// The least, the median and the most.
fn range(values: &[f64]) -> Option<[f64; 3]> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    Some([*values.first()?, values[values.len() / 2], *values.last()?])
}

fn text(values: &[f64], decimals: usize) -> String {
    match range(values) {
        Some([least, median, most]) if values.len() > 1 => {
            format!("{median:.decimals$} ({least:.decimals$}-{most:.decimals$})")
        }
        Some([_, median, _]) => format!("{median:.decimals$}"),
        None => "n/a".to_owned(),
    }
}
