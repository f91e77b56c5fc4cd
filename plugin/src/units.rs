//! Quantities as people write and read them: sizes, durations, times.

use std::time::Duration;

/// One mebibyte, in bytes.
pub const MIB: u64 = 1 << 20;

/// One gibibyte, in bytes.
pub const GIB: u64 = 1 << 30;

/// Parses a size with its unit (`512K`, `200M`, `1.5G`, `2T`, optionally `iB`), powers of 1024; in bytes.
///
/// A number without a unit is refused: nobody should have to guess what it counts.
///
/// # Errors
/// Says what is wrong with the text, for clap to print.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split_unit(text)?;
    let shift = match unit.to_ascii_uppercase().trim_end_matches("IB") {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "" => return Err(format!("{text:?} has no unit; write for example {text}M")),
        _ => return Err(format!("unknown unit {unit:?}; use K, M, G or T")),
    };
    let bytes = number * (1_u64 << shift) as f64;
    if !(1.0..9.0e18).contains(&bytes) {
        return Err(format!("{text:?} is out of range"));
    }
    Ok(bytes as u64)
}

/// Parses a duration with its unit (`30s`, `10m`, `2h`, `1d`).
///
/// # Errors
/// Says what is wrong with the text, for clap to print.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split_unit(text)?;
    let seconds = match unit {
        "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        "" => return Err(format!("{text:?} has no unit; write for example {text}m")),
        _ => return Err(format!("unknown unit {unit:?}; use s, m, h or d")),
    };
    let seconds = number * seconds;
    if !(0.001..1.0e9).contains(&seconds) {
        return Err(format!("{text:?} is out of range"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

fn split_unit(text: &str) -> Result<(f64, &str), String> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number = number.parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    Ok((number, unit.trim()))
}

/// `1.2 GiB`, `40 GiB`, `512 B`.
#[must_use]
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() < 0.05 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// `0.08 s`, `12 s`, `2 min 31 s`, `3 h 05 min`.
#[must_use]
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..10 => format!("{:.2} s", duration.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// `280 MiB/s`; nothing was measurable in no time.
#[must_use]
pub fn human_rate(bytes: u64, duration: Duration) -> String {
    let seconds = duration.as_secs_f64().max(0.001);
    format!("{}/s", human_bytes((bytes as f64 / seconds) as u64))
}

/// A Unix time in milliseconds in the local zone: `2026-11-21 22:00:04 CET`.
#[must_use]
pub fn local_time(unix_ms: i64) -> String {
    format_time(unix_ms, "%Y-%m-%d %H:%M:%S %Z")
}

/// Short, for a line of a table: `20 Nov 22:00`.
#[must_use]
pub fn short_time(unix_ms: i64) -> String {
    format_time(unix_ms, "%-d %b %H:%M")
}

fn format_time(unix_ms: i64, format: &str) -> String {
    match jiff::Timestamp::from_millisecond(unix_ms) {
        Ok(time) => time.to_zoned(jiff::tz::TimeZone::system()).strftime(format).to_string(),
        Err(_) => format!("{unix_ms} ms"),
    }
}

/// Now, in Unix milliseconds.
#[must_use]
pub fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_their_unit() {
        assert_eq!(parse_size("200M"), Ok(200 * MIB));
        assert_eq!(parse_size("20GiB"), Ok(20 * GIB));
        assert_eq!(parse_size("1.5g"), Ok(3 * GIB / 2));
        for wrong in ["200", "", "M", "-3M", "3X", "0M", "1e9", "99999999999T"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
        assert!(parse_size("200").is_err_and(|message| message.contains("no unit")));
    }

    #[test]
    fn durations_need_their_unit() {
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse_duration("90s"), Ok(Duration::from_secs(90)));
        for wrong in ["2", "h", "", "2 weeks", "0s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn people_can_read_them() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(40 * GIB), "40 GiB");
        assert_eq!(human_bytes(1_288_490_189), "1.2 GiB");
        assert_eq!(human_duration(Duration::from_millis(80)), "0.08 s");
        assert_eq!(human_duration(Duration::from_secs(151)), "2 min 31 s");
        assert_eq!(human_rate(280 * MIB, Duration::from_secs(1)), "280 MiB/s");
    }
}
