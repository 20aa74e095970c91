//! Memory, CPUs and command lines that cannot be.

use super::*;

#[test]
fn memory_that_is_no_size_or_out_of_range_is_refused() {
    assert_bad_values(
        "--memory",
        &[
            ("0", "at least"),
            ("1M", "at least"),
            ("lots", "as in 512M or 2G"),
            ("", "as in 512M or 2G"),
            ("-1G", "as in 512M or 2G"),
            ("512MB", "as in 512M or 2G"),
            ("1000T", "more than"),
            ("99999999999999999999999", "more than"),
        ],
    );
}

#[test]
fn memory_beyond_the_hosts_is_refused_with_both_sizes() {
    let host = rustix::system::sysinfo();
    let host = (host.totalram + host.totalswap).saturating_mul(u64::from(host.mem_unit));
    let wanted = if host < 1 << 40 { "1T" } else { "30T" };
    let mib = format!("{} MiB", host >> 20);
    let files = Files::new();
    assert_refused(
        files.boot(&["--memory", wanted]),
        FAILED,
        &["memory", "this host", &mib],
    );
}

/// How many huge pages of 2 MiB the host has free.
fn free_huge_pages() -> Option<u64> {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

kvm_test!(memory_beyond_the_free_huge_pages_is_refused, || {
    // A kernel without huge pages refuses them by its own words.
    let free = free_huge_pages();
    let size = format!("{}M", 2 * free.unwrap_or(0) + 16);
    let remedy: &[&str] = match free {
        Some(_) => &[
            &size,
            "in huge pages",
            "2 MiB",
            "nr_hugepages",
            "omit --hugepages",
        ],
        None => &[&size],
    };
    let files = Files::new();
    assert_refused(
        files.boot(&["--hugepages", "--memory", &size]),
        FAILED,
        remedy,
    );
});

#[test]
fn cpus_out_of_range_are_refused_with_the_range() {
    let range = "from 1 to 254";
    assert_bad_values(
        "--cpus",
        &[
            ("0", range),
            ("255", range),
            ("5000", range),
            ("two", range),
            ("", range),
        ],
    );
}

kvm_test!(command_line_too_long_is_refused_with_the_limit, || {
    let long = "x".repeat(3000);
    let files = Files::new();
    assert_refused(
        files.boot(&["--cmdline", &long]),
        FAILED,
        &["kernel command line", "bytes", "takes 2047", "shorten"],
    );
});

kvm_test!(command_line_that_begins_with_a_hyphen_is_passed_on, || {
    // `--` separates the kernel's own arguments from init's.
    let guest = run(Files::new().boot(&["--cmdline", "-- single"]));
    assert_eq!(guest.status, Some(0), "{guest:?}");
});

#[test]
fn option_that_does_not_exist_is_refused() {
    let files = Files::new();
    assert_refused(
        files.boot(&["--floppy", "x"]),
        USAGE,
        &["--floppy", "--help"],
    );
    assert_refused(files.boot(&["extra"]), USAGE, &["extra", "--help"]);
    assert_refused(files.boot(&["-v", "-q"]), USAGE, &["--verbose", "--quiet"]);
}
