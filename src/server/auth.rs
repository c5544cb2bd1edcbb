//! Who may come in: API keys, held as hashes only.

use std::path::Path;
use std::sync::Arc;

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// Random bytes of a key: beyond guessing.
const KEY_BYTES: usize = 24;
/// What a key begins with, so that people and secret scanners know one.
const KEY_PREFIX: &str = "csb_";

/// The keys that open the door.
#[derive(Debug)]
pub enum Auth {
    /// Everybody may.
    Open,
    /// Whoever bears one of these.
    Keys(Vec<Key>),
}

/// A key's hash, and whose it is.
#[derive(Debug, Clone)]
pub struct Key {
    tenant: Arc<str>,
    hash: [u8; 32],
}

/// A keys file that cannot be used; says which line and what would be right.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Error(String);

impl Auth {
    /// Reads a file of `tenant:hash` lines; empty ones and those that begin with `#` are passed over.
    ///
    /// # Errors
    /// Where it cannot be read, a line is neither, or there is no key in it.
    pub fn from_file(path: &Path) -> Result<Auth, Error> {
        let text =
            std::fs::read_to_string(path).map_err(|error| Error(format!("{}: {error}", path.display())))?;
        let mut keys = Vec::new();
        for (index, line) in text.lines().map(str::trim).enumerate() {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            keys.push(Key::parse(line).ok_or_else(|| {
                Error(format!("{}:{}: expected TENANT:SHA256-IN-HEX", path.display(), index + 1))
            })?);
        }
        match keys.is_empty() {
            true => Err(Error(format!(
                "{}: no key in it; make one: codesandbox key new --tenant NAME",
                path.display()
            ))),
            false => Ok(Auth::Keys(keys)),
        }
    }

    /// Whether no key is asked for.
    pub(super) fn is_open(&self) -> bool {
        matches!(self, Auth::Open)
    }

    /// The tenant of a request, empty where everybody may; `None` where it may not come in.
    pub(super) fn tenant(&self, headers: &HeaderMap) -> Option<Arc<str>> {
        let Auth::Keys(keys) = self else { return Some(Arc::default()) };
        let bearer = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        });
        let presented = bearer.or_else(|| headers.get("x-api-key")?.to_str().ok())?;
        let hash: [u8; 32] = Sha256::digest(presented.as_bytes()).into();
        // All are looked at, so that the time tells nothing of which one matched.
        let known = keys
            .iter()
            .fold(None, |found, key| if bool::from(key.hash.ct_eq(&hash)) { Some(key) } else { found });
        known.map(|key| key.tenant.clone())
    }
}

impl Key {
    /// A new key: itself, to be given away once, and its line for the keys file.
    pub fn generate(tenant: &str) -> (String, String) {
        let mut random = [0; KEY_BYTES];
        getrandom::fill(&mut random).expect("the kernel gives random numbers once it is up");
        let key = format!("{KEY_PREFIX}{}", hex::encode(random));
        let line = format!("{tenant}:{}", hex::encode(Sha256::digest(key.as_bytes())));
        (key, line)
    }

    fn parse(line: &str) -> Option<Key> {
        let (tenant, digits) = line.split_once(':')?;
        let mut hash = [0; 32];
        hex::decode_to_slice(digits, &mut hash).ok().filter(|()| !tenant.is_empty())?;
        Some(Key { tenant: tenant.into(), hash })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(lines: &str) -> Result<Auth, Error> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys");
        std::fs::write(&path, lines).unwrap();
        Auth::from_file(&path)
    }

    #[test]
    fn a_key_opens_the_door_in_either_header_and_names_its_tenant() {
        let ((alice, alice_line), (bob, bob_line)) = (Key::generate("alice"), Key::generate("bob"));
        let auth = auth(&format!("# keys\n{alice_line}\n\n{bob_line}\n")).unwrap();
        let with = |name: &'static str, value: String| {
            HeaderMap::from_iter([(name.parse().unwrap(), value.parse().unwrap())])
        };
        assert_eq!(auth.tenant(&with("authorization", format!("Bearer {alice}"))), Some("alice".into()));
        assert_eq!(auth.tenant(&with("authorization", format!("bearer {bob}"))), Some("bob".into()));
        assert_eq!(auth.tenant(&with("x-api-key", bob.clone())), Some("bob".into()));
        for wrong in [format!("Basic {alice}"), format!("Bearer {alice}x"), "Bearer".into(), String::new()] {
            assert_eq!(auth.tenant(&with("authorization", wrong)), None);
        }
        assert_eq!(auth.tenant(&HeaderMap::new()), None);
    }

    #[test]
    fn a_keys_file_that_means_nothing_is_refused_with_its_line() {
        let (_, good) = Key::generate("a");
        for (bad, says) in
            [("", "no key"), ("alice", ":1:"), (&*format!("{good}\nbob:xyz"), ":2:"), (":00", ":1:")]
        {
            assert!(auth(bad).unwrap_err().to_string().contains(says), "{bad}");
        }
    }
}
