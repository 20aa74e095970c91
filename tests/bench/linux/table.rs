//! Figures, and the tables that they make.

use std::collections::BTreeMap;

/// One of a table, in one round.
#[derive(Debug)]
pub struct Figure {
    pub table: String,
    pub row: String,
    pub column: String,
    pub value: f64,
}

/// What a line that carries a figure out of the lab begins with.
const MARK: &str = "FIGURE";

impl Figure {
    /// As a line.
    pub fn line(&self) -> String {
        let Self {
            table, row, column, ..
        } = self;
        [MARK, table, row, column, &self.value.to_string()].join("\t")
    }

    /// Out of a line.
    pub fn parse(line: &str) -> Option<Self> {
        let parts: Vec<_> = line.split('\t').collect();
        let [MARK, table, row, column, value] = parts[..] else {
            return None;
        };
        Some(Self {
            table: table.to_owned(),
            row: row.to_owned(),
            column: column.to_owned(),
            value: value.parse().ok()?,
        })
    }
}

/// All of a run, in the order in which they came.
#[derive(Debug, Default)]
pub struct Figures {
    tables: Vec<String>,
    rows: Vec<(String, String)>,
    columns: Vec<(String, String)>,
    /// By table, row and column; one for each round.
    values: BTreeMap<[String; 3], Vec<f64>>,
}

impl Figures {
    /// Adds one.
    pub fn add(&mut self, figure: Figure) {
        let Figure {
            table, row, column, ..
        } = figure;
        note(&mut self.tables, table.clone());
        note(&mut self.rows, (table.clone(), row.clone()));
        note(&mut self.columns, (table.clone(), column.clone()));
        let values = self.values.entry([table, row, column]).or_default();
        values.push(figure.value);
    }

    /// Prints the tables: medians, and of several rounds the least and the most.
    pub fn print(&self) {
        for table in &self.tables {
            let columns = || self.columns.iter().filter(|(of, _)| of == table);
            println!("\n{table}\n");
            print!("{:<20}", "");
            columns().for_each(|(_, column)| print!("{column:>26}"));
            println!();
            for (_, row) in self.rows.iter().filter(|(of, _)| of == table) {
                print!("{row:<20}");
                for (_, column) in columns() {
                    let key = [table.clone(), row.clone(), column.clone()];
                    print!(
                        "{:>26}",
                        self.values.get(&key).map_or("-".to_owned(), |v| cell(v))
                    );
                }
                println!();
            }
        }
    }
}

fn note<T: PartialEq>(list: &mut Vec<T>, item: T) {
    if !list.contains(&item) {
        list.push(item);
    }
}

/// The median, and the spread.
fn cell(values: &[f64]) -> String {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let text = |value: f64| match value {
        ..10.0 => format!("{value:.3}"),
        _ => format!("{value:.0}"),
    };
    match values[..] {
        [] => String::new(),
        [value] => text(value),
        [least, .., most] => {
            let median = text(values[values.len() / 2]);
            format!("{median} ({}-{})", text(least), text(most))
        }
    }
}
