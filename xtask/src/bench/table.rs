//! Tables as Markdown, for `docs/results.md`.

/// A table with a heading row.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table of these columns.
    pub fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// Prints it, columns aligned.
    pub fn print(&self) {
        let columns = self.rows[0].len();
        let width = |c: usize| self.rows.iter().map(|r| r[c].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for (i, row) in self.rows.iter().enumerate() {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, &w)| format!("{cell:<w$}")).collect();
            println!("| {} |", cells.join(" | "));
            if i == 0 {
                let rule: Vec<String> = widths.iter().map(|&w| "-".repeat(w)).collect();
                println!("|-{}-|", rule.join("-|-"));
            }
        }
    }
}

/// Bytes as megabytes (10^6).
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Mean and half of its 95 % interval (Student's t), each through `show`.
pub fn interval(readings: &[f64], show: impl Fn(f64) -> String) -> String {
    const T: [f64; 10] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];
    let n = readings.len();
    if n == 0 {
        return String::new();
    }
    let mean = readings.iter().sum::<f64>() / n as f64;
    if n == 1 {
        return show(mean);
    }
    let variance = readings.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1) as f64;
    let t = T.get(n - 2).copied().unwrap_or(1.96);
    format!("{} ± {}", show(mean), show(t * (variance / n as f64).sqrt()))
}
