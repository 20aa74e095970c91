//! When frames that are received are looked for by the clock, and not by being woken for each.
//!
//! Woken for a frame, the thread often takes the CPU from who sends it: the next frame is not there
//! yet, and all that the thread does is one frame a wake-up. Where frames come fast it pauses a
//! little instead, and finds many.

use std::time::{Duration, Instant};

/// The longest pause: a frame is delayed by no more than that. A sender that waits until its frames are
/// taken has few of them on their way, and would wait with twice as much.
const LONGEST: Duration = Duration::from_micros(100);
/// The frames that have to come in a pause for it to be worthwhile: 80,000 a second.
const FEWEST: u64 = 8;
/// How long frames have to come fast before there is a pause.
const WINDOW: Duration = Duration::from_micros(500);
/// How long there is none after one that was not worthwhile.
const HOLD_OFF: Duration = Duration::from_millis(10);

/// What has passed a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Frames for the driver.
    pub received: u64,
    /// Chains that they filled.
    pub chains: u64,
    /// Frames from the driver.
    pub sent: u64,
}

/// How fast frames come.
#[derive(Debug)]
pub struct Pace {
    /// What is measured: since when, or from when on, and what had passed then.
    since: Instant,
    passed: Passed,
    /// It is what came in a pause.
    paused: bool,
}

impl Pace {
    /// Measures from `now` on, when `passed` has.
    pub fn new(now: Instant, passed: Passed) -> Self {
        Self {
            since: now,
            passed,
            paused: false,
        }
    }

    /// For how long a thread that has found no more frames shall pause, if at all: as long as half
    /// a ring of `size` descriptors lasts.
    pub fn pause(&mut self, now: Instant, passed: Passed, size: u16) -> Option<Duration> {
        let Some(time) = now.checked_duration_since(self.since) else {
            self.passed = passed;
            return None;
        };
        if time < WINDOW && !self.paused {
            return None;
        }
        let was = std::mem::replace(self, Self::new(now, passed));
        let received = passed.received - was.passed.received;
        let chains = (passed.chains - was.passed.chains).max(1);
        let sent = passed.sent - was.passed.sent;
        let ring_lasts = time.mul_f64(f64::from(size / 2) / chains as f64);
        let pause = ring_lasts.min(LONGEST);
        let expected = received as f64 * pause.as_secs_f64() / time.as_secs_f64();
        // Who waits for an answer to each frame before it sends the next one gains nothing.
        let answers = 3 * sent > 2 * received;
        if expected < FEWEST as f64 || answers {
            if was.paused {
                self.since += HOLD_OFF;
            }
            return None;
        }
        self.paused = true;
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RING: u16 = 256;
    const MS: Duration = Duration::from_millis(1);

    /// Goes on by `time`, in which frames of so many chains each were received and `sent` sent.
    struct Bench {
        pace: Pace,
        now: Instant,
        passed: Passed,
    }

    impl Bench {
        fn new() -> Self {
            let (now, passed) = (Instant::now(), Passed::default());
            Self {
                pace: Pace::new(now, passed),
                now,
                passed,
            }
        }

        fn after(
            &mut self,
            time: Duration,
            frames: u64,
            chains: u64,
            sent: u64,
        ) -> Option<Duration> {
            self.now += time;
            self.passed.received += frames;
            self.passed.chains += frames * chains;
            self.passed.sent += sent;
            self.pace.pause(self.now, self.passed, RING)
        }
    }

    #[test]
    fn fast_frames_bring_pauses_and_slow_ones_none() {
        for (frames, pause) in [
            (0, None),
            (60, None),
            (90, Some(LONGEST)),
            (500, Some(LONGEST)),
            // 128 of 256 descriptors last half as long.
            (2560, Some(LONGEST / 2)),
        ] {
            assert_eq!(Bench::new().after(MS, frames, 1, 0), pause, "{frames}");
        }
    }

    #[test]
    fn pause_comes_only_after_a_while() {
        let mut bench = Bench::new();
        for _ in 0..4 {
            assert_eq!(bench.after(WINDOW / 5, 50, 1, 0), None);
        }
        assert!(bench.after(WINDOW / 5, 50, 1, 0).is_some());
        assert!(bench.after(LONGEST, 50, 1, 0).is_some(), "and goes on");
    }

    #[test]
    fn large_frames_of_which_a_ring_holds_few_bring_no_pause() {
        assert_eq!(Bench::new().after(MS, 120, 32, 0), None);
        assert!(Bench::new().after(MS, 120, 4, 0).is_some());
    }

    #[test]
    fn frames_that_are_answered_one_by_one_bring_no_pause() {
        assert_eq!(Bench::new().after(MS, 120, 1, 120), None);
        assert!(
            Bench::new().after(MS, 120, 1, 60).is_some(),
            "acknowledgements of TCP"
        );
    }

    #[test]
    fn pause_in_which_little_came_is_the_last_for_a_time() {
        let mut bench = Bench::new();
        assert!(bench.after(MS, 120, 1, 0).is_some());
        assert_eq!(bench.after(LONGEST, 1, 1, 0), None);
        for _ in 0..9 {
            assert_eq!(bench.after(MS, 120, 1, 0), None);
        }
        assert_eq!(bench.after(MS, 120, 1, 0), None, "nothing measured before");
        assert!(bench.after(MS, 120, 1, 0).is_some());
    }
}
