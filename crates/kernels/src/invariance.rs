//! A row's result is the same bits alone and in any company, at random.

use proptest::prelude::*;

use crate::attention::tests::{Case, shape};
use crate::kv::{KvFormat, Run};
use crate::product::tests::{matrices, noise, product};
use crate::thread_pool::ThreadPool;

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// Widths of rows: any, of whole groups, of whole blocks of every format.
fn inputs() -> impl Strategy<Value = usize> {
    prop_oneof![1usize..100, (1usize..20).prop_map(|groups| groups * 32), (1usize..4).prop_map(|blocks| blocks * 256)]
}

/// Part of another sequence that is in the batch too: its first position and its tokens.
fn company() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((0usize..200, prop_oneof![Just(1), 1usize..50]), 0..4)
}

/// A cut of a prompt: how many tokens the next piece has, and who is before and after it in the batch.
type Cut = (usize, Vec<(usize, usize)>, Vec<(usize, usize)>);

fn cuts() -> impl Strategy<Value = Vec<Cut>> {
    // Pieces of one token are another way through the kernel.
    prop::collection::vec((prop_oneof![Just(1), 1usize..80], company(), company()), 1..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_product_of_a_row(rows in 1usize..40, outputs in 1usize..70, inputs in inputs(), threads in 1usize..=4, seed in 0usize..2003) {
        let (pool, one) = (ThreadPool::new(threads, &[]).unwrap(), ThreadPool::new(1, &[]).unwrap());
        let x = noise(rows * inputs, seed);
        for (name, matrix) in matrices(&pool, outputs, inputs) {
            let together = bits(&product(&pool, &matrix, &x));
            for r in 0..rows {
                let alone = bits(&product(&one, &matrix, &x[r * inputs..(r + 1) * inputs]));
                prop_assert_eq!(&alone, &together[r * outputs..(r + 1) * outputs], "{}, row {}", name, r);
            }
        }
    }

    #[test]
    fn attention_of_a_token(
        (kv_heads, group) in (1usize..4, prop_oneof![1usize..5, Just(9), Just(30)]),
        head_dim in prop_oneof![Just(64), 1usize..70],
        block_tokens in (1usize..4).prop_map(|n| n * 16),
        start in 0usize..40,
        cuts in cuts(),
        threads in 1usize..=4,
    ) {
        let blocks = 320usize.div_ceil(block_tokens);
        // The sequence's own blocks lie backwards, after those that its company reads.
        let own: Vec<u32> = (blocks as u32..(start + 560).div_ceil(block_tokens) as u32 + blocks as u32).rev().collect();
        let others: Vec<u32> = (0..blocks as u32).collect();
        let tokens: usize = cuts.iter().map(|(tokens, ..)| tokens).sum();
        for format in [KvFormat::F32, KvFormat::F16, KvFormat::Int8] {
            let case = Case::new(kv_heads * group, shape(kv_heads, head_dim, block_tokens, blocks + own.len()), format, threads);
            let row = kv_heads * group * head_dim;
            let q = case.queries(tokens);
            let whole = bits(&case.run(&q, &[Run { blocks: &own, start, tokens }]));
            let mut first = 0;
            for (tokens, before, after) in &cuts {
                let other = |(start, tokens): &(usize, usize)| Run { blocks: &others, start: *start, tokens: *tokens };
                let mut spans: Vec<Run<'_>> = before.iter().map(other).collect();
                spans.push(Run { blocks: &own, start: start + first, tokens: *tokens });
                spans.extend(after.iter().map(other));
                let count = |company: &[(usize, usize)]| company.iter().map(|(_, tokens)| tokens).sum::<usize>();
                let mine = count(before) * row..(count(before) + tokens) * row;
                let mut queries = case.queries(count(before) + tokens + count(after));
                queries[mine.clone()].copy_from_slice(&q[first * row..(first + tokens) * row]);
                let piece = bits(&case.run(&queries, &spans)[mine]);
                prop_assert_eq!(&piece, &whole[first * row..(first + tokens) * row], "{:?}, tokens from {} on", format, first);
                first += tokens;
            }
        }
    }
}
