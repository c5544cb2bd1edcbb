//! What headers say of a file, and what a request's headers ask of it.

use std::time::{Duration, SystemTime};

use hyper::HeaderMap;
use hyper::header::{HeaderName, IF_NONE_MATCH, IF_RANGE, RANGE};

use crate::session::files::Facts;

/// The end of the year 9999: formats for people go no further.
const LAST_SECOND: u64 = 253_402_300_799;

/// A strong validator. A file that was put has an inode of its own; one that a program changes in place, twice within
/// a tick of the kernel's clock (4 ms) and without another size, keeps its tag.
pub(super) fn etag(facts: &Facts) -> String {
    format!("\"{:x}-{:x}-{:x}\"", facts.inode, facts.mtime_ns, facts.size)
}

/// The moment of the last change, as far as formats for people have it: a guest may set any.
pub(super) fn modified(facts: &Facts) -> SystemTime {
    let since = Duration::from_nanos(u64::try_from(facts.mtime_ns).unwrap_or(0));
    SystemTime::UNIX_EPOCH + since.min(Duration::from_secs(LAST_SECOND))
}

/// Whether the client has it already.
pub(super) fn is_known(headers: &HeaderMap, etag: &str) -> bool {
    let tags = headers.get_all(IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let weak = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
    tags.flat_map(|list| list.split(',')).map(weak).any(|tag| tag == "*" || tag == etag)
}

/// What is asked of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Whole,
    /// From here on, so many.
    Range {
        from: u64,
        length: u64,
    },
    /// Nothing of it is there.
    Nowhere,
}

/// The part that `Range` asks for; the whole where it is none of ours (more than one, another unit), or where
/// `If-Range` means another version.
pub(super) fn part(headers: &HeaderMap, etag: &str, size: u64) -> Part {
    let text = |name: HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let Some(range) = text(RANGE).and_then(|value| value.strip_prefix("bytes=")) else { return Part::Whole };
    if headers.contains_key(IF_RANGE) && text(IF_RANGE) != Some(etag) {
        return Part::Whole;
    }
    let Some((first, last)) = range.trim().split_once('-') else { return Part::Whole };
    let number = |text: &str| match text {
        "" => Some(None),
        digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
            Some(Some(digits.parse().unwrap_or(u64::MAX)))
        }
        _ => None,
    };
    match (number(first), number(last)) {
        (Some(Some(first)), Some(last)) if last.is_none_or(|last| last >= first) => {
            let end = last.unwrap_or(u64::MAX).saturating_add(1).min(size);
            if first >= size { Part::Nowhere } else { Part::Range { from: first, length: end - first } }
        }
        (Some(None), Some(Some(most))) => match most.min(size) {
            0 => Part::Nowhere,
            length => Part::Range { from: size - length, length },
        },
        _ => Part::Whole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn a_range_is_cut_at_the_end_of_the_file() {
        let part = |range| part(&headers(RANGE, range), "\"x\"", 10);
        let range = |from, length| Part::Range { from, length };
        for (asked, is) in [
            ("bytes=0-0", range(0, 1)),
            ("bytes=0-9", range(0, 10)),
            ("bytes=5-", range(5, 5)),
            ("bytes=9-99999999999999999999999", range(9, 1)),
            ("bytes=-3", range(7, 3)),
            ("bytes=-30", range(0, 10)),
            ("bytes=10-", Part::Nowhere),
            ("bytes=99999999999999999999999-", Part::Nowhere),
            ("bytes=-0", Part::Nowhere),
            ("bytes=5-4", Part::Whole),
            ("bytes=-", Part::Whole),
            ("bytes=0-1,3-4", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("lines=0-1", Part::Whole),
        ] {
            assert_eq!(part(asked), is, "{asked}");
        }
        assert_eq!(super::part(&headers(RANGE, "bytes=0-"), "\"x\"", 0), Part::Nowhere);
    }

    #[test]
    fn a_range_of_another_version_is_the_whole() {
        let mut asked = headers(RANGE, "bytes=0-0");
        asked.insert(IF_RANGE, "\"x\"".parse().unwrap());
        assert_eq!(part(&asked, "\"x\"", 10), Part::Range { from: 0, length: 1 });
        assert_eq!(part(&asked, "\"y\"", 10), Part::Whole);
    }

    #[test]
    fn a_tag_is_known_alone_in_a_list_weak_or_as_any() {
        for value in ["\"x\"", "\"a\", \"x\"", "W/\"x\"", "*"] {
            assert!(is_known(&headers(IF_NONE_MATCH, value), "\"x\""), "{value}");
        }
        for value in ["\"y\"", "x", ""] {
            assert!(!is_known(&headers(IF_NONE_MATCH, value), "\"x\""), "{value}");
        }
    }

    #[test]
    fn any_time_that_a_guest_sets_can_be_told() {
        for mtime_ns in [i64::MIN, -1, 0, i64::MAX] {
            let facts = Facts { mtime_ns, ..Facts::default() };
            let text = humantime::format_rfc3339_millis(modified(&facts)).to_string();
            assert!(text.ends_with('Z') && httpdate::fmt_http_date(modified(&facts)).ends_with("GMT"));
        }
    }
}
