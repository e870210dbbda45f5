//! Whole numbers as JSON has them: 16.0 is one, and some clients' languages know no other.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, Unexpected, Visitor};

/// A whole number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Whole<T>(pub(crate) T);

impl<'de, T: TryFrom<i64>> Deserialize<'de> for Whole<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Numbers(PhantomData))
    }
}

/// A field that may hold one.
///
/// # Errors
/// The format's, where it holds anything else.
pub(crate) fn number<'de, D: Deserializer<'de>, T: TryFrom<i64>>(field: D) -> Result<Option<T>, D::Error> {
    Ok(Option::deserialize(field)?.map(|Whole(number)| number))
}

/// A field that may hold several.
///
/// # Errors
/// The format's, where it holds anything else.
pub(crate) fn numbers<'de, D: Deserializer<'de>, T: TryFrom<i64>>(field: D) -> Result<Option<Vec<T>>, D::Error> {
    Ok(Option::<Vec<Whole<T>>>::deserialize(field)?.map(plain))
}

/// As plain numbers.
pub(crate) fn plain<T>(numbers: Vec<Whole<T>>) -> Vec<T> {
    numbers.into_iter().map(|Whole(number)| number).collect()
}

struct Numbers<T>(PhantomData<T>);

impl<T: TryFrom<i64>> Visitor<'_> for Numbers<T> {
    type Value = Whole<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number that {} holds", std::any::type_name::<T>())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Whole<T>, E> {
        T::try_from(value).map(Whole).map_err(|_| E::invalid_value(Unexpected::Signed(value), &self))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Whole<T>, E> {
        match i64::try_from(value) {
            Ok(value) => self.visit_i64(value),
            Err(_) => Err(E::invalid_value(Unexpected::Unsigned(value), &self)),
        }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Whole<T>, E> {
        // From -2^63 on, and below 2^63, a whole f64 is an i64 to the bit.
        const END: f64 = (1_u64 << 63) as f64;
        if value.fract() == 0.0 && (-END..END).contains(&value) {
            self.visit_i64(value as i64)
        } else {
            Err(E::invalid_value(Unexpected::Float(value), &self))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_whole_is_taken_and_nothing_else() {
        let read = serde_json::from_str::<Whole<u32>>;
        for (text, value) in [("16", 16), ("16.0", 16), ("1.6e1", 16), ("-0.0", 0), ("4294967295", u32::MAX), ("4294967295.0", u32::MAX)] {
            assert_eq!(read(text).unwrap(), Whole(value), "{text}");
        }
        for text in ["16.5", "-1", "-1.0", "4294967296", "4294967296.0", "1e300", "1e-300", "\"16\"", "null", "[16]", "true"] {
            assert!(read(text).is_err(), "{text}");
        }
        let long = serde_json::from_str::<Whole<i64>>;
        assert_eq!(long("9223372036854775807").unwrap(), Whole(i64::MAX));
        assert_eq!(long("-9.223372036854775808e18").unwrap(), Whole(i64::MIN));
        assert!(long("9.223372036854775808e18").is_err() && long("9223372036854775808").is_err());
        assert!(read("16.5").unwrap_err().to_string().contains("a whole number that u32 holds"));
    }
}
