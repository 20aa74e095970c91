//! `minivmm stats`: what is counted of a running virtual machine, once or again and again.

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write};
use std::thread;
use std::time::Duration;

use serde_json::json;

use crate::cli::{StatsArgs, Target};
use crate::commands::json;
use crate::instance::{self, FindError};
use crate::qmp::client::{Client, ClientError};
use crate::stats::{
    BlkCounters, DiskStats, ExitCounts, NicStats, PairCounters, Stats, VsockCounters,
};

/// How long the virtual machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// There is none of that name.
    #[error(transparent)]
    Find(#[from] FindError),
    /// It does not answer.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// QEMU runs it, or whoever serves the socket.
    #[error(
        "the virtual machine has no statistics: the native monitor counts them, and QEMU does not"
    )]
    None,
    /// It is another version of this program.
    #[error("the virtual machine's statistics have another form")]
    Form(#[source] serde_json::Error),
    /// Nothing can be written.
    #[error("cannot write to stdout")]
    Output(#[source] io::Error),
}

/// Shows them, with `--watch` until the virtual machine ends or the reader of stdout does.
///
/// # Errors
///
/// See [`StatsError`].
pub fn run(args: &StatsArgs) -> Result<(), StatsError> {
    let mut client = match &args.target {
        Target::Vm(name) => instance::find(name)?.connect(PATIENCE)?,
        Target::Socket(path) => Client::connect(path, PATIENCE)?,
    };
    let mut before = None;
    loop {
        let value = match client.execute("x-minivmm-stats", json!({})) {
            // It has been seen to its end.
            Err(ClientError::Closed) if before.is_some() => return Ok(()),
            Err(ClientError::Refused { class, .. }) if class == "CommandNotFound" => {
                return Err(StatsError::None);
            }
            answer => answer?,
        };
        let stats: Stats = serde_json::from_value(value.clone()).map_err(StatsError::Form)?;
        let text = match (args.json, args.watch) {
            (true, None) => json(&value),
            (true, Some(_)) => format!("{value}\n"),
            (false, None) => report(&stats, None),
            (false, Some(_)) => report(&stats, Some(before.as_ref().unwrap_or(&stats))),
        };
        // The first has no rates yet.
        let is_shown = args.json || args.watch.is_none() || before.is_some();
        if is_shown && !print(&text)? {
            return Ok(());
        }
        let Some(seconds) = args.watch else {
            return Ok(());
        };
        before = Some(stats);
        thread::sleep(Duration::from_secs(seconds.into()));
    }
}

/// False when the reader has seen enough.
fn print(text: &str) -> Result<bool, StatsError> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    match written.and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(StatsError::Output(error)),
    }
}

/// What a column counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Count,
    Bytes,
}

use Unit::{Bytes, Count};

/// A name and a number for each column.
type Row = (String, Vec<u64>);

const NIC: &[(&str, Unit)] = &[
    ("rx frames", Count),
    ("rx bytes", Bytes),
    ("rx dropped", Count),
    ("rx starved", Count),
    ("tx frames", Count),
    ("tx bytes", Bytes),
    ("tx refused", Count),
    ("limited", Count),
    ("kicks", Count),
    ("irqs", Count),
    ("wake-ups", Count),
];

const VCPU: &[(&str, Unit)] = &[
    ("port reads", Count),
    ("port writes", Count),
    ("mmio reads", Count),
    ("mmio writes", Count),
    ("hlt", Count),
    ("interrupted", Count),
    ("other exits", Count),
];

const DISK: &[(&str, Unit)] = &[
    ("reads", Count),
    ("read", Bytes),
    ("writes", Count),
    ("written", Bytes),
    ("flushes", Count),
    ("discards", Count),
    ("errors", Count),
    ("limited", Count),
    ("kicks", Count),
    ("irqs", Count),
    ("wake-ups", Count),
];

const VSOCK: &[(&str, Unit)] = &[
    ("open", Count),
    ("from host", Count),
    ("from guest", Count),
    ("refused", Count),
    ("rx", Bytes),
    ("tx", Bytes),
];

/// The row of a vCPU: how often it has left the guest, and what for.
fn vcpu_row((index, exits): (usize, &ExitCounts)) -> Row {
    let counters = vec![
        exits.io_in,
        exits.io_out,
        exits.mmio_read,
        exits.mmio_write,
        exits.hlt,
        exits.interrupted,
        exits.other,
    ];
    (format!("vcpu{index}"), counters)
}

/// A row for each queue pair.
fn nic_rows(nic: &NicStats) -> Vec<Row> {
    let row = |(index, pair): (usize, &PairCounters)| {
        let (rx, tx) = (&pair.rx, &pair.tx);
        let counters = vec![
            rx.frames,
            rx.bytes,
            rx.filtered + rx.too_large + rx.errors,
            rx.starved,
            tx.frames,
            tx.bytes,
            tx.bad_chains + tx.refused,
            rx.limited + tx.limited,
            pair.rx_kicks + pair.tx_kicks,
            pair.rx_interrupts + pair.tx_interrupts,
            pair.wakeups,
        ];
        (format!("{}.{index}", nic.name), counters)
    };
    nic.queues.iter().enumerate().map(row).collect()
}

/// A row for each queue.
fn disk_rows(disk: &DiskStats) -> Vec<Row> {
    let row = |(index, queue): (usize, &BlkCounters)| {
        let counters = vec![
            queue.reads,
            queue.read_bytes,
            queue.writes,
            queue.written_bytes,
            queue.flushes,
            queue.discards,
            queue.errors,
            queue.limited,
            queue.kicks,
            queue.interrupts,
            queue.wakeups,
        ];
        (format!("{}.{index}", disk.name), counters)
    };
    disk.queues.iter().enumerate().map(row).collect()
}

fn vsock_row(counters: &VsockCounters) -> Row {
    let columns = vec![
        counters.open,
        counters.from_host,
        counters.from_guest,
        counters.refused,
        counters.rx_bytes,
        counters.tx_bytes,
    ];
    ("vsock".into(), columns)
}

/// For people: totals, or with an earlier state what came a second since then.
fn report(stats: &Stats, before: Option<&Stats>) -> String {
    let seconds = |stats: &Stats| stats.uptime_us as f64 / 1e6;
    let mut text = format!(
        "up {:.1} s, memory {} of {} resident",
        seconds(stats),
        bytes(stats.memory.resident as f64),
        bytes(stats.memory.size as f64),
    );
    if let Some(balloon) = stats.balloon {
        let (actual, target) = (bytes(balloon.actual as f64), bytes(balloon.target as f64));
        let _ = write!(text, ", balloon {actual} of {target}");
    }
    if let Some(said) = stats.console_bytes {
        let _ = write!(text, ", console {}", bytes(said as f64));
    }
    text.push('\n');
    let per = before.map(|before| seconds(stats) - seconds(before));
    type Rows = fn(&Stats) -> Vec<Row>;
    let tables: [(_, Rows); 4] = [
        (NIC, |stats| stats.nics.iter().flat_map(nic_rows).collect()),
        (DISK, |stats| {
            stats.disks.iter().flat_map(disk_rows).collect()
        }),
        (VSOCK, |stats| stats.vsock.iter().map(vsock_row).collect()),
        (VCPU, |stats| {
            stats.vcpus.iter().enumerate().map(vcpu_row).collect()
        }),
    ];
    for (columns, rows) in tables {
        let earlier = before.map(rows);
        table(
            &mut text,
            columns,
            &rows(stats),
            earlier.as_deref().zip(per),
        );
    }
    for nic in stats.nics.iter().filter(|nic| nic.vhost) {
        let _ = writeln!(
            text,
            "{}: the kernel moves the frames, and does not count them here",
            nic.name
        );
    }
    text
}

/// Appends a table: a line for each row, if there are any.
fn table(
    text: &mut String,
    columns: &[(&str, Unit)],
    rows: &[Row],
    earlier: Option<(&[Row], f64)>,
) {
    let head = columns.iter().map(|(name, _)| (*name).to_owned());
    let name = if earlier.is_some() { "a second" } else { "" };
    let mut lines = vec![(name.to_owned(), head.collect::<Vec<_>>())];
    for (index, (name, counters)) in rows.iter().enumerate() {
        let cell = |(column, counter): (usize, &u64)| {
            let value = match earlier {
                Some((rows, seconds)) if seconds > 0.0 => {
                    let old = rows.get(index).map_or(0, |(_, old)| old[column]);
                    counter.saturating_sub(old) as f64 / seconds
                }
                _ => *counter as f64,
            };
            match columns[column].1 {
                Bytes => bytes(value),
                Count => format!("{value:.0}"),
            }
        };
        let cells = counters.iter().enumerate().map(cell).collect();
        lines.push((name.clone(), cells));
    }
    let width = |column: usize| lines.iter().map(|(_, cells)| cells[column].len()).max();
    let widths: Vec<_> = (0..columns.len()).filter_map(width).collect();
    for (name, cells) in lines.iter().filter(|_| !rows.is_empty()) {
        let _ = write!(text, "{name:<8}");
        for (cell, width) in cells.iter().zip(&widths) {
            let _ = write!(text, "  {cell:>width$}");
        }
        text.push('\n');
    }
}

/// A number of bytes in at most six characters.
fn bytes(mut value: f64) -> String {
    for unit in ["", "K", "M", "G"] {
        if value < 1000.0 {
            let digits = usize::from(value < 100.0 && !unit.is_empty());
            return format!("{value:.digits$}{unit}");
        }
        value /= 1024.0;
    }
    format!("{value:.1}T")
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixListener;

    use super::*;

    fn stats(uptime_us: u64, frames: u64) -> Stats {
        let mut pair = PairCounters::default();
        (pair.rx.frames, pair.rx.bytes) = (frames, frames * 1024);
        Stats {
            uptime_us,
            nics: vec![NicStats {
                name: "net0".into(),
                queues: vec![pair],
                ..NicStats::default()
            }],
            ..Stats::default()
        }
    }

    fn words(text: &str) -> Vec<&str> {
        text.lines().nth(2).unwrap().split_whitespace().collect()
    }

    #[test]
    fn report_has_totals_or_what_came_a_second() {
        let (before, after) = (stats(1_000_000, 100), stats(3_000_000, 5100));
        let totals = report(&after, None);
        assert_eq!(words(&totals)[..3], ["net0.0", "5100", "5.0M"]);
        let rates = report(&after, Some(&before));
        assert_eq!(words(&rates)[..3], ["net0.0", "2500", "2.4M"]);
    }

    #[test]
    fn server_without_statistics_is_an_error_of_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let error = json!({"class": "CommandNotFound", "desc": "no such command"});
            let answers = [
                json!({"QMP": {}}),
                json!({"return": {}}),
                json!({"error": error}),
            ];
            for answer in answers {
                stream.write_all(format!("{answer}\n").as_bytes()).unwrap();
            }
            // Until the client has gone.
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let args = StatsArgs {
            target: Target::Socket(path),
            watch: None,
            json: false,
        };
        let error = run(&args).unwrap_err();
        assert!(matches!(error, StatsError::None), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn bytes_are_shown_in_few_characters() {
        for (value, shown) in [
            (0.0, "0"),
            (999.0, "999"),
            (1024.0, "1.0K"),
            (150_000.0, "146K"),
            (5e9, "4.7G"),
            (9e15, "8185.5T"),
        ] {
            assert_eq!(bytes(value), shown);
        }
    }
}
