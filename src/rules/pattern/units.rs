//! UTF-16 units, which JavaScript counts where it has no `u` flag.
//!
//! A character beyond U+FFFF is two units there, the halves of a surrogate pair, and a pattern can ask for either. Rust's text has
//! no halves, so each stands here as a character of the last private plane: a text written so has no other character beyond U+FFFF,
//! and nothing is mistaken.

use std::borrow::Cow;

const SURROGATE_FIRST: u32 = 0xD800;
const SURROGATE_LAST: u32 = 0xDFFF;
const HALVES_FIRST: u32 = 0x10_0000;

/// One character for each unit; the text itself where it has none beyond U+FFFF, which is nearly always.
pub(super) fn one_char_each(text: &str) -> Cow<'_, str> {
    // Only characters beyond U+FFFF begin with such a byte.
    match text.bytes().any(|byte| byte >= 0xF0) {
        true => Cow::Owned(text.encode_utf16().map(char_of).collect()),
        false => Cow::Borrowed(text),
    }
}

pub(super) fn char_of(unit: u16) -> char {
    let code = u32::from(unit);
    let code = if (SURROGATE_FIRST..=SURROGATE_LAST).contains(&code) { code - SURROGATE_FIRST + HALVES_FIRST } else { code };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// Of a character that `one_char_each` or `char_of` made.
pub(super) fn unit_of(c: char) -> u16 {
    let code = u32::from(c);
    let code = if code >= HALVES_FIRST { code - HALVES_FIRST + SURROGATE_FIRST } else { code };
    u16::try_from(code).unwrap_or(0xFFFD)
}

/// The text again; nothing where a half stands alone.
pub(super) fn text_of(chars: &str) -> Option<String> {
    String::from_utf16(&chars.chars().map(unit_of).collect::<Vec<_>>()).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_half_alone_is_no_text() {
        assert_eq!(text_of(&char_of(0xD83D).to_string()), None);
        assert_eq!(one_char_each("a😀").chars().count(), 3);
        assert!(matches!(one_char_each("日本"), Cow::Borrowed(_)));
    }

    proptest! {
        #[test]
        fn every_text_comes_back(text in "\\PC{0,20}", plane in "[\u{FFFF0}-\u{10FFFF}]{0,5}") {
            let text = text + &plane;
            prop_assert_eq!(text_of(&one_char_each(&text)), Some(text));
        }

        #[test]
        fn every_unit_comes_back(unit: u16) {
            prop_assert_eq!(unit_of(char_of(unit)), unit);
        }
    }
}
