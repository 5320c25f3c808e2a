//! What the elements of tensors are.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The word of the safetensors format, or that of GGUF for elements that are packed into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Dtype {
    Plain(safetensors::Dtype),
    Packed(Packed),
}

impl Dtype {
    /// What a tensor of that shape has; None if that is no whole number, or more than 64 bits can count.
    pub fn bytes(self, shape: &[u64]) -> Option<u64> {
        let (elements, bits) = match self {
            Self::Plain(plain) => (1, plain.bitsize() as u64),
            Self::Packed(packed) => (packed.block_elements(), packed.block_bytes() * 8),
        };
        // A block is of one row.
        if !shape.last().unwrap_or(&1).is_multiple_of(elements) {
            return None;
        }
        let count = shape.iter().try_fold(1_u64, |count, dimension| count.checked_mul(*dimension))?;
        let bits = (count / elements).checked_mul(bits)?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl From<safetensors::Dtype> for Dtype {
    fn from(plain: safetensors::Dtype) -> Self {
        Self::Plain(plain)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain(plain) => plain.fmt(f),
            Self::Packed(packed) => fmt::Debug::fmt(packed, f),
        }
    }
}

macro_rules! packed {
    ($($name:ident: $id:literal, $elements:literal in $bytes:literal;)*) => {
        /// Elements that are packed into blocks of a few bytes, by GGML's names. What is in a block is its user's business.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        #[allow(non_camel_case_types, reason = "GGML's names")]
        pub enum Packed { $($name,)* }

        impl Packed {
            /// By its number in GGUF files.
            pub fn of_gguf(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(Self::$name),)*
                    _ => None,
                }
            }

            pub fn block_elements(self) -> u64 {
                match self { $(Self::$name => $elements,)* }
            }

            pub fn block_bytes(self) -> u64 {
                match self { $(Self::$name => $bytes,)* }
            }
        }
    };
}

packed! {
    Q4_0: 2, 32 in 18;
    Q4_1: 3, 32 in 20;
    Q5_0: 6, 32 in 22;
    Q5_1: 7, 32 in 24;
    Q8_0: 8, 32 in 34;
    Q8_1: 9, 32 in 36;
    Q2_K: 10, 256 in 84;
    Q3_K: 11, 256 in 110;
    Q4_K: 12, 256 in 144;
    Q5_K: 13, 256 in 176;
    Q6_K: 14, 256 in 210;
    Q8_K: 15, 256 in 292;
    IQ2_XXS: 16, 256 in 66;
    IQ2_XS: 17, 256 in 74;
    IQ3_XXS: 18, 256 in 98;
    IQ1_S: 19, 256 in 50;
    IQ4_NL: 20, 32 in 18;
    IQ3_S: 21, 256 in 110;
    IQ2_S: 22, 256 in 82;
    IQ4_XS: 23, 256 in 136;
    IQ1_M: 29, 256 in 56;
    TQ1_0: 34, 256 in 54;
    TQ2_0: 35, 256 in 66;
    MXFP4: 39, 32 in 17;
    NVFP4: 40, 64 in 36;
    Q1_0: 41, 128 in 18;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_formats() {
        let read = |text: &str| serde_json::from_str::<Dtype>(text).expect("a dtype");
        assert_eq!(read("\"BF16\""), Dtype::Plain(safetensors::Dtype::BF16));
        assert_eq!(read("\"IQ4_XS\""), Dtype::Packed(Packed::IQ4_XS));
        for text in ["BF16", "F8_E4M3", "Q4_K", "MXFP4"] {
            let dtype = read(&format!("{text:?}"));
            assert_eq!(
                (dtype.to_string(), serde_json::to_string(&dtype).expect("a word")),
                (text.to_owned(), format!("{text:?}"))
            );
        }
        assert!(serde_json::from_str::<Dtype>("\"Q9\"").is_err());
    }

    #[test]
    fn bytes_are_counted_by_blocks_of_a_row() {
        let q4 = Dtype::Packed(Packed::Q4_K);
        assert_eq!(q4.bytes(&[3, 512]), Some(3 * 2 * 144));
        assert_eq!(q4.bytes(&[512, 3]), None);
        assert_eq!(q4.bytes(&[]), None);
        assert_eq!(q4.bytes(&[5, 0]), Some(0));
        assert_eq!(q4.bytes(&[u64::MAX, 256]), None);
        let f32 = Dtype::Plain(safetensors::Dtype::F32);
        assert_eq!(
            (f32.bytes(&[]), f32.bytes(&[2, 3]), f32.bytes(&[0, u64::MAX])),
            (Some(4), Some(24), Some(0))
        );
        assert_eq!(Dtype::Plain(safetensors::Dtype::F4).bytes(&[3]), None);
    }
}
