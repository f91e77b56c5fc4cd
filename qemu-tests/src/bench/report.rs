//! A report in Markdown: prose, tables, and targets whose outcome is computed, never written down.

use std::fmt::{self, Display, Formatter};

/// A table: every row has as many cells as there are columns.
pub struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table under these headings.
    #[must_use]
    pub fn new<T: AsRef<str>>(columns: &[T]) -> Self {
        let columns = columns.iter().map(|column| column.as_ref().to_owned()).collect();
        Table { columns, rows: Vec::new() }
    }

    /// One more row; what is missing is empty.
    pub fn row<T: AsRef<str>>(&mut self, cells: &[T]) {
        let mut cells: Vec<String> = cells.iter().map(|cell| cell.as_ref().to_owned()).collect();
        cells.resize(self.columns.len().max(cells.len()), String::new());
        self.rows.push(cells);
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut line = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            writeln!(f, "| {} |", cells.join(" | "))
        };
        line(&self.columns)?;
        line(&vec!["---".to_owned(); self.columns.len()])?;
        self.rows.iter().try_for_each(|row| line(row))
    }
}

/// Which side of its bound a figure has to be on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Side {
    AtMost,
    AtLeast,
}

/// What is asked of a figure.
#[derive(Clone, Debug)]
pub struct Target {
    what: String,
    measured: f64,
    side: Side,
    bound: f64,
    unit: &'static str,
}

impl Target {
    /// A figure that may be at most `bound`.
    #[must_use]
    pub fn at_most(what: &str, measured: f64, bound: f64, unit: &'static str) -> Self {
        Target { what: what.to_owned(), measured, side: Side::AtMost, bound, unit }
    }

    /// A figure that has to be at least `bound`.
    #[must_use]
    pub fn at_least(what: &str, measured: f64, bound: f64, unit: &'static str) -> Self {
        Target { what: what.to_owned(), measured, side: Side::AtLeast, bound, unit }
    }

    /// Is it on the right side? What could not be measured (not a number) is not.
    #[must_use]
    pub fn met(&self) -> bool {
        match self.side {
            Side::AtMost => self.measured <= self.bound,
            Side::AtLeast => self.measured >= self.bound,
        }
    }

    fn cells(&self) -> [String; 4] {
        let sign = if self.side == Side::AtMost { "≤" } else { "≥" };
        [
            self.what.clone(),
            format!("{sign} {} {}", number(self.bound), self.unit).trim_end().to_owned(),
            format!("{} {}", number(self.measured), self.unit).trim_end().to_owned(),
            if self.met() { "met".to_owned() } else { "**missed**".to_owned() },
        ]
    }
}

/// Three significant digits, and whole numbers where there are more.
#[must_use]
pub fn number(value: f64) -> String {
    if !value.is_finite() {
        return "not measured".to_owned();
    }
    let places = match value.abs() {
        v if v == 0.0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.places$}")
}

/// A report that grows from top to bottom.
pub struct Report {
    text: String,
}

impl Report {
    /// A report with a title.
    #[must_use]
    pub fn new(title: &str) -> Self {
        Report { text: format!("# {title}\n") }
    }

    /// A heading.
    pub fn heading(&mut self, text: &str) {
        self.add(&format!("## {text}"));
    }

    /// A paragraph.
    pub fn text(&mut self, text: &str) {
        self.add(text);
    }

    /// Commands as they were run.
    pub fn commands<T: AsRef<str>>(&mut self, commands: &[T]) {
        let lines: Vec<&str> = commands.iter().map(AsRef::as_ref).collect();
        self.add(&format!("```\n{}\n```", lines.join("\n")));
    }

    /// A table.
    pub fn table(&mut self, table: &Table) {
        self.add(table.to_string().trim_end());
    }

    /// A plot that `ci/bench-plots` makes from a CSV of the same name.
    pub fn plot(&mut self, name: &str, what: &str) {
        self.add(&format!("![{what}]({name}.svg)"));
    }

    /// Targets and whether they are met.
    pub fn targets(&mut self, targets: &[Target]) {
        let mut table = Table::new(&["target", "asked", "measured", ""]);
        for target in targets {
            table.row(&target.cells());
        }
        self.table(&table);
    }

    fn add(&mut self, block: &str) {
        self.text.push('\n');
        self.text.push_str(block);
        self.text.push('\n');
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_met_on_its_side_of_the_bound() {
        assert!(Target::at_most("size", 0.75, 0.75, "").met());
        assert!(!Target::at_most("size", 0.76, 0.75, "").met());
        assert!(Target::at_least("rate", 800.0, 800.0, "MB/s").met());
        assert!(!Target::at_least("rate", 799.0, 800.0, "MB/s").met());
        assert!(!Target::at_least("rate", f64::NAN, 800.0, "MB/s").met());
        assert!(!Target::at_most("size", f64::NAN, 0.75, "").met());
    }

    #[test]
    fn a_report_is_markdown() {
        let mut report = Report::new("Title");
        let mut table = Table::new(&["a", "b"]);
        table.row(&["1|2", "3"]);
        report.table(&table);
        report.targets(&[Target::at_most("x", 12.34, 2.0, "s")]);
        let expected = "# Title\n\n| a | b |\n| --- | --- |\n| 1\\|2 | 3 |\n\n\
            | target | asked | measured |  |\n| --- | --- | --- | --- |\n\
            | x | ≤ 2.00 s | 12.3 s | **missed** |\n";
        assert_eq!(report.to_string(), expected);
    }
}
