//! How much may pass a NIC in one direction: a token bucket for bits, another for frames.
//!
//! A frame passes while a bucket has any token at all, and is paid for afterwards, so a bucket may
//! go into debt. A frame's length need not be known before it has passed, a frame may be larger
//! than a full bucket, and yet what passes in the long run is the rate to the bit.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::lock;

/// Shorter waits would cost more in wake-ups than they gain in smoothness.
const MIN_WAIT: Duration = Duration::from_micros(100);
/// A sender asks again after each wait, so that a longer one may come in parts.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// A bucket that ran over while its sender waits, or is woken a little late, would make
/// the rate a lie.
const MIN_BURST: Duration = Duration::from_millis(1);

/// The bits of a nanosecond at one bit a second: levels are counted in these, so that no rounding
/// ever loses a part of a token.
const TOKEN: i128 = 1_000_000_000;

/// What may pass in one direction. `None` is without limit, and 0 lets nothing pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Bits of Ethernet frames, without preamble, checksum and virtio-net header, a second.
    pub bits: Option<u64>,
    /// Frames a second. What the guest or the host leaves to be segmented counts as one.
    pub frames: Option<u64>,
    /// How long a sender that was silent may exceed the rate: what a full bucket holds is the rate
    /// times this, but at least a millisecond's worth.
    pub burst: Duration,
}

/// Holds one direction of a NIC to its limit. All queue pairs of the NIC share it.
///
/// Each thread asks [`admit`](Self::admit) before a frame and calls [`charge`](Self::charge) after
/// it, so that at most one frame for each thread is on its way unpaid.
#[derive(Debug)]
pub struct Limiter {
    /// Absent without a limit: then no lock is taken.
    buckets: Option<Mutex<Buckets>>,
}

impl Limiter {
    /// Starts with full buckets.
    pub fn new(limit: RateLimit) -> Self {
        let bucket = |rate| Bucket::new(rate, limit.burst);
        let buckets = Buckets {
            bits: limit.bits.map(bucket),
            frames: limit.frames.map(bucket),
            filled: None,
        };
        let limited = buckets.bits.is_some() || buckets.frames.is_some();
        Self {
            buckets: limited.then(|| Mutex::new(buckets)),
        }
    }

    /// How full the buckets are now.
    pub fn save(&self) -> Levels {
        let Some(buckets) = &self.buckets else {
            return Levels::default();
        };
        let mut buckets = lock(buckets);
        buckets.fill(Instant::now());
        let level = |bucket: &Bucket| bucket.level.div_euclid(TOKEN) as i64;
        Levels {
            bits: buckets.bits.as_ref().map(level),
            frames: buckets.frames.as_ref().map(level),
        }
    }

    /// Sets how full the buckets are; those without a level stay full.
    pub fn restore(&self, levels: Levels) {
        let Some(buckets) = &self.buckets else {
            return;
        };
        let mut buckets = lock(buckets);
        let Buckets { bits, frames, .. } = &mut *buckets;
        for (bucket, level) in [(bits, levels.bits), (frames, levels.frames)] {
            if let (Some(bucket), Some(level)) = (bucket, level) {
                bucket.level = (i128::from(level) * TOKEN).min(bucket.capacity);
            }
        }
    }

    /// Whether a frame may pass now.
    ///
    /// # Errors
    ///
    /// Says how long to wait before asking again: never so short that the caller would spin.
    pub fn admit(&self, now: Instant) -> Result<(), Duration> {
        let Some(buckets) = &self.buckets else {
            return Ok(());
        };
        let mut buckets = lock(buckets);
        buckets.fill(now);
        let waits = [&buckets.bits, &buckets.frames].into_iter().flatten();
        waits.filter_map(Bucket::wait).max().map_or(Ok(()), Err)
    }

    /// Until when nothing may pass.
    pub fn held_until(&self) -> Option<Instant> {
        self.buckets.as_ref()?;
        let now = Instant::now();
        self.admit(now).err().map(|wait| now + wait)
    }

    /// Takes the tokens for a frame that has passed: its length in bytes, without the virtio-net
    /// header.
    pub fn charge(&self, frame_bytes: usize) {
        let Some(buckets) = &self.buckets else {
            return;
        };
        let mut buckets = lock(buckets);
        if let Some(bits) = &mut buckets.bits {
            bits.take(frame_bytes as i128 * 8);
        }
        if let Some(frames) = &mut buckets.frames {
            frames.take(1);
        }
    }
}

/// How full a limiter's buckets are, in whole tokens: negative in debt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Levels {
    bits: Option<i64>,
    frames: Option<i64>,
}

#[derive(Debug)]
struct Buckets {
    bits: Option<Bucket>,
    frames: Option<Bucket>,
    /// Up to when the buckets have had their tokens; none before the first frame, when they are
    /// full.
    filled: Option<Instant>,
}

impl Buckets {
    fn fill(&mut self, now: Instant) {
        let filled = *self.filled.get_or_insert(now);
        // Another thread may have read the clock earlier and come here later.
        if now <= filled {
            return;
        }
        for bucket in [&mut self.bits, &mut self.frames].into_iter().flatten() {
            bucket.fill(now - filled);
        }
        self.filled = Some(now);
    }
}

/// Levels in parts of a [`TOKEN`]: a nanosecond brings as many as the rate is.
#[derive(Debug)]
struct Bucket {
    /// Tokens a second.
    rate: i128,
    /// When full.
    capacity: i128,
    /// Now; negative in debt.
    level: i128,
}

impl Bucket {
    fn new(rate: u64, burst: Duration) -> Self {
        let rate = i128::from(rate);
        let capacity = gain(rate, burst.max(MIN_BURST));
        Self {
            rate,
            capacity,
            level: capacity,
        }
    }

    fn fill(&mut self, elapsed: Duration) {
        let level = self.level.saturating_add(gain(self.rate, elapsed));
        self.level = level.min(self.capacity);
    }

    fn take(&mut self, tokens: i128) {
        self.level = self.level.saturating_sub(tokens * TOKEN);
    }

    /// How long it takes until there is something in it, where there is not.
    fn wait(&self) -> Option<Duration> {
        if self.level > 0 {
            return None;
        }
        let nanos = self.level.saturating_neg().checked_div(self.rate);
        // Rounded down, so that one more is past the debt.
        let nanos = nanos.and_then(|nanos| u64::try_from(nanos.saturating_add(1)).ok());
        let wait = nanos.map_or(MAX_WAIT, Duration::from_nanos);
        Some(wait.clamp(MIN_WAIT, MAX_WAIT))
    }
}

/// What `time` brings. It saturates far above any level that matters.
fn gain(rate: i128, time: Duration) -> i128 {
    rate.saturating_mul(time.as_nanos() as i128)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const TBIT: u64 = 1_000_000_000_000;
    const SECOND: Duration = Duration::from_secs(1);

    fn limiter(bits: impl Into<Option<u64>>, frames: impl Into<Option<u64>>, ms: u64) -> Limiter {
        Limiter::new(RateLimit {
            bits: bits.into(),
            frames: frames.into(),
            burst: Duration::from_millis(ms),
        })
    }

    /// Sends frames of this size for so long, waiting as long as it has to; returns how many passed.
    fn backlogged(limiter: &Limiter, start: Instant, time: Duration, frame: usize) -> u64 {
        let (mut now, mut passed) = (start, 0);
        while now < start + time {
            match limiter.admit(now) {
                Ok(()) => {
                    limiter.charge(frame);
                    passed += 1;
                }
                Err(wait) => now += wait,
            }
        }
        passed
    }

    #[test]
    fn no_limit_admits_everything() {
        let limiter = limiter(None, None, 10);
        assert!(limiter.buckets.is_none());
        limiter.charge(usize::MAX);
        assert_eq!(limiter.admit(Instant::now()), Ok(()));
    }

    /// Bits and frames a second, the burst in ms, a frame charged at once, and the wait then.
    type Case = (Option<u64>, Option<u64>, u64, usize, Option<Duration>);

    #[test]
    fn refused_frame_is_told_how_long_to_wait() {
        let micros = Duration::from_micros;
        let nano = Duration::from_nanos(1);
        let cases: [Case; 12] = [
            (Some(8_000_000), None, 10, 9_999, None),
            (Some(8_000_000), None, 10, 10_000, Some(MIN_WAIT)),
            (Some(8_000_000), None, 10, 10_099, Some(MIN_WAIT)),
            (Some(8_000_000), None, 10, 10_101, Some(micros(101) + nano)),
            (
                Some(8_000_000),
                None,
                10,
                20_000,
                Some(micros(10_000) + nano),
            ),
            (Some(8_000_000), None, 0, 2_000, Some(micros(1_000) + nano)),
            (Some(TBIT), None, 1, 65_550, None),
            (Some(1), None, 1, 65_550, Some(MAX_WAIT)),
            (Some(0), None, 10, 0, Some(MAX_WAIT)),
            (None, Some(100), 20, 65_550, None),
            (None, Some(100), 10, 60, Some(MIN_WAIT)),
            (
                Some(8_000_000),
                Some(10),
                1,
                9_000,
                Some(micros(99_000) + nano),
            ),
        ];
        for (n, (bits, frames, burst, frame, expected)) in cases.into_iter().enumerate() {
            let limiter = limiter(bits, frames, burst);
            limiter.charge(frame);
            assert_eq!(limiter.admit(Instant::now()).err(), expected, "case {n}");
        }
    }

    #[test]
    fn burst_smaller_than_a_frame_still_passes_frames() {
        for (bits, frames) in [(Some(1_000_000), None), (None, Some(2))] {
            let limiter = limiter(bits, frames, 0);
            let start = Instant::now();
            assert_eq!(limiter.admit(start), Ok(()));
            limiter.charge(65_550);
            assert!(limiter.admit(start).is_err());
            assert_eq!(limiter.admit(start + SECOND), Ok(()));
        }
    }

    #[test]
    fn silence_fills_no_more_than_a_burst() {
        let limiter = limiter(TBIT, 1_000, 10);
        let start = Instant::now();
        let century = 100 * 365 * 86_400 * SECOND;
        for now in [start, start + century, start + 2 * century] {
            let mut passed = 0;
            while limiter.admit(now).is_ok() {
                limiter.charge(1_500);
                passed += 1;
            }
            assert_eq!(passed, 10);
        }
    }

    #[test]
    fn clock_of_a_slower_thread_gives_no_token_twice() {
        let limiter = limiter(None, 1, 1_000);
        let start = Instant::now();
        assert_eq!(limiter.admit(start + SECOND), Ok(()));
        limiter.charge(60);
        assert_eq!(limiter.admit(start), Err(MIN_WAIT));
        assert_eq!(limiter.admit(start + SECOND), Err(MIN_WAIT));
        assert_eq!(limiter.admit(start + 2 * SECOND), Ok(()));
    }

    #[test]
    fn small_rate_asked_often_does_not_drift() {
        let limiter = limiter(None, 3, 1);
        let start = Instant::now();
        let mut passed = 0;
        for step in 0..1_000_000 {
            if limiter
                .admit(start + step * Duration::from_nanos(99_991))
                .is_ok()
            {
                limiter.charge(60);
                passed += 1;
            }
        }
        // 99.991 s at 3 a second, after the one for which the bucket was full.
        assert_eq!(passed, 300);
    }

    #[test]
    fn threads_share_one_limit() {
        let limiter = limiter(None, 1_000, 100);
        let (now, passed) = (Instant::now(), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while limiter.admit(now).is_ok() {
                        passed.fetch_add(1, Ordering::Relaxed);
                        limiter.charge(60);
                    }
                });
            }
        });
        let passed = passed.into_inner();
        assert!((100..104).contains(&passed), "{passed}");
    }

    #[test]
    fn lateness_within_a_burst_costs_no_rate() {
        let limiter = limiter(1_000_000_000, None, 10);
        let start = Instant::now();
        let (mut now, mut bytes) = (start, 0);
        while now < start + SECOND {
            match limiter.admit(now) {
                Ok(()) => {
                    limiter.charge(1_514);
                    bytes += 1_514;
                }
                Err(wait) => now += wait + Duration::from_millis(9),
            }
        }
        assert!(bytes >= 125_000_000, "{bytes}");
    }

    proptest! {
        #[test]
        fn what_passes_in_any_time_is_bounded(
            bits in 1..=TBIT,
            frames in 1..10_000_000u64,
            burst in 0..50_000_000u64,
            calls in prop::collection::vec((0..20_000_000u64, 1..=65_550usize), 1..80),
        ) {
            let burst = Duration::from_nanos(burst);
            let limiter = Limiter::new(RateLimit { bits: Some(bits), frames: Some(frames), burst });
            let burst = burst.max(MIN_BURST).as_nanos();
            let mut now = Instant::now();
            let mut passed: Vec<(Instant, u128)> = Vec::new();
            for (pause, frame) in calls {
                now += Duration::from_nanos(pause);
                if limiter.admit(now).is_ok() {
                    limiter.charge(frame);
                    passed.push((now, frame as u128 * 8));
                }
            }
            for (first, (start, _)) in passed.iter().enumerate() {
                let (mut before, mut count) = (0, 0);
                for (end, size) in &passed[first..] {
                    // All but the latest, in parts of a token.
                    let time = (*end - *start).as_nanos() + burst;
                    prop_assert!(before * TOKEN as u128 <= u128::from(bits) * time);
                    prop_assert!(count * TOKEN as u128 <= u128::from(frames) * time);
                    before += size;
                    count += 1;
                }
            }
        }

        #[test]
        fn sender_that_waits_as_told_gets_the_rate(
            rate in 1_000..=TBIT,
            burst in 0..50u64,
            frame in 60..=65_550usize,
        ) {
            let bits = frame as u64 * 8;
            // Long enough for a thousand frames.
            let time = Duration::from_nanos(bits * TOKEN as u64 / rate * 1_000 + 1);
            let passed = backlogged(&limiter(rate, None, burst), Instant::now(), time, frame);
            let wanted = u128::from(rate) * time.as_nanos() / TOKEN as u128 / u128::from(bits);
            prop_assert!(u128::from(passed) * 100 >= wanted * 99, "{passed} of {wanted}");
        }

        #[test]
        fn sender_of_small_frames_gets_the_rate_in_frames(rate in 1..=1_000_000u64, burst in 0..50u64) {
            let time = Duration::from_nanos(TOKEN as u64 / rate * 1_000);
            let passed = backlogged(&limiter(None, rate, burst), Instant::now(), time, 60);
            prop_assert!(passed >= 990, "{passed}");
        }
    }
}
