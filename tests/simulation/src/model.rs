//! A pair whose answers are known beforehand: its models compute hashes.
//!
//! A row of the KV cache is a hash of its model, its layer, its token, its position and the row before it. The token that
//! follows is chosen by a hash of all rows that the block table says, from the first on. So a row that is missing, foreign, stale
//! or misplaced gives another answer than the one that [`undisturbed`] computes from the prompt alone, without blocks, batches,
//! chunks or nodes.

use overfill_kv::BlockId;
use overfill_model::cache::WireRows;
use overfill_model::{Chunk, ModelError, Row, Sampled, Sampler};
use overfill_nccl::{Gpu, GpuBytes};
use overfill_prefill_node::{CachedRows, OnLayer};
use overfill_types::{FinishReason, PairManifest, Quality, SamplingParams, StopConditions, WireFormat};

use crate::cache::{Cache, NO_ROW};

/// Tokens of answers lie below, but for the one that ends them: one byte each, so that an answer's text tells its tokens.
const ALPHABET: u64 = 128;
/// One token in so many ends the answer.
const ENDS: u64 = 64;
/// Logits of the tokens that are likely: greedy answers take the first, drawn ones any.
const LIKELY: [f32; 4] = [9.0, 8.0, 7.0, 6.0];

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// The full model.
    Full,
    /// The decode model of a pair.
    Decode(usize),
}

impl Half {
    /// What makes its hashes other than those of other models.
    fn salt(self) -> u64 {
        match self {
            Self::Full => 0,
            Self::Decode(pair) => pair as u64 + 1,
        }
    }
}

/// One model of the pair, with its KV cache.
pub struct Model {
    half: Half,
    cache: Cache,
    vocabulary: Vocabulary,
    /// Of what the last pass was asked the logits of.
    hashes: Vec<u64>,
    /// In whose memory its rows are, as far as nodes can see.
    gpu: Option<Gpu>,
}

/// What tokens there are.
#[derive(Clone, Debug)]
struct Vocabulary {
    size: usize,
    eos: Vec<u32>,
}

impl Model {
    /// With a cache of so many blocks.
    pub fn new(half: Half, manifest: &PairManifest, blocks: u32, block_tokens: usize) -> Self {
        let geometry = match half {
            Half::Full => manifest.full.kv,
            Half::Decode(_) => manifest.decode.kv,
        };
        let cache = Cache::new(geometry, manifest.kv_formats.wire, blocks, block_tokens);
        Self { half, cache, vocabulary: Vocabulary::of(manifest), hashes: Vec::new(), gpu: None }
    }

    /// The same, whose rows leave from this GPU, and come to it.
    #[must_use]
    pub fn on(self, gpu: Gpu) -> Self {
        Self { gpu: Some(gpu), ..self }
    }

    /// Reads the tokens of one chunk in one layer.
    fn read(&mut self, layer: usize, chunk: &Chunk<'_>) {
        for (position, token) in (chunk.start..).zip(chunk.tokens) {
            let before = match position {
                0 => NO_ROW,
                _ => self.cache.row(layer, chunk.blocks, position - 1),
            };
            self.cache.set(layer, chunk.blocks, position, row(self.half, layer, *token, position, before));
        }
    }

    /// The hash of all rows of a sequence up to `last`.
    fn hash(&self, blocks: &[BlockId], last: usize) -> u64 {
        let layers = self.cache.layers();
        let rows = (0..=last).flat_map(|position| (0..layers).map(move |layer| (layer, position)));
        rows.fold(self.half.salt(), |hash, (layer, position)| mix(hash, self.cache.row(layer, blocks, position)))
    }
}

impl overfill_prefill_node::Compute for Model {
    fn forward(&mut self, chunks: &[Chunk<'_>], wanted: &[usize], on_layer: OnLayer<'_>) -> Result<(), ModelError> {
        for layer in 0..self.cache.layers() {
            chunks.iter().for_each(|chunk| self.read(layer, chunk));
            on_layer(layer, &mut &self.cache);
        }
        let all: Vec<(&[BlockId], usize)> =
            chunks.iter().flat_map(|c| (c.start..c.start + c.tokens.len()).map(|position| (c.blocks, position))).collect();
        self.hashes = wanted.iter().map(|&i| self.hash(all[i].0, all[i].1)).collect();
        Ok(())
    }

    fn tokens(&mut self, rows: Vec<Row<'_>>) -> Vec<Option<Sampled>> {
        assert_eq!(rows.len(), self.hashes.len(), "each row of logits has its use");
        let token = |(row, hash): (Row<'_>, &u64)| match row {
            Row::Choose(sampler, position) => self.vocabulary.choose(*hash, sampler, position),
            Row::Known(token, _) => Sampled { token, logprob: None },
        };
        rows.into_iter().zip(&self.hashes).map(|row| Some(token(row))).collect()
    }

    fn cached(&mut self) -> impl CachedRows {
        &self.cache
    }

    fn gpu(&self, _pair: usize) -> Option<Gpu> {
        self.gpu.clone()
    }
}

impl overfill_decode_node::Compute for Model {
    fn write(&mut self, layer: usize, blocks: &[BlockId], rows: WireRows<'_>) -> Result<(), ModelError> {
        self.cache.write(layer, blocks, rows.start, rows.k, rows.v);
        Ok(())
    }

    fn put(&mut self, _: WireFormat, layer: usize, blocks: &[BlockId], start: usize, rows: &mut GpuBytes) -> Result<(), ModelError> {
        let both = rows.read()?;
        let (k, v) = both.split_at(both.len() / 2);
        self.cache.write(layer, blocks, start, k, v);
        Ok(())
    }

    fn on_gpu(&self, _wire: WireFormat) -> bool {
        self.gpu.is_some()
    }

    fn forward(&mut self, chunks: &[Chunk<'_>]) -> Result<(), ModelError> {
        for layer in 0..self.cache.layers() {
            chunks.iter().for_each(|chunk| self.read(layer, chunk));
        }
        let last = |chunk: &Chunk<'_>| chunk.start + chunk.tokens.len() - 1;
        self.hashes = chunks.iter().filter(|chunk| chunk.logits).map(|chunk| self.hash(chunk.blocks, last(chunk))).collect();
        Ok(())
    }

    fn choose(&mut self, samplers: Vec<(&mut Sampler, usize)>) -> Vec<Option<Sampled>> {
        assert_eq!(samplers.len(), self.hashes.len(), "each row of logits has its sampler");
        let chosen = samplers.into_iter().zip(&self.hashes);
        chosen.map(|((sampler, position), hash)| Some(self.vocabulary.choose(*hash, sampler, position))).collect()
    }
}

impl Vocabulary {
    fn of(manifest: &PairManifest) -> Self {
        Self { size: manifest.vocab_size(), eos: manifest.tokenizer.eos_token_ids.clone() }
    }

    fn choose(&self, hash: u64, sampler: &mut Sampler, position: usize) -> Sampled {
        let mut logits = vec![0.0; self.size];
        for (i, logit) in (0..).zip(LIKELY) {
            logits[(mix(hash, i) % ALPHABET) as usize] = logit;
        }
        if mix(hash, u64::MAX).is_multiple_of(ENDS) {
            self.eos.iter().for_each(|eos| logits[*eos as usize] = 2.0 * LIKELY[0]);
        }
        sampler.sample(&mut logits, position)
    }
}

/// The answer of a pair (its number, its manifest) to a prompt that nothing disturbs, and why it ends: the one that every node
/// has its part in.
pub fn undisturbed(
    (number, manifest): (usize, &PairManifest),
    quality: Quality,
    prompt: &[u32],
    sampling: &SamplingParams,
    stop: &StopConditions,
) -> (Vec<u32>, FinishReason) {
    let (vocabulary, mut sampler) = (Vocabulary::of(manifest), Sampler::new(sampling.clone(), prompt));
    let (reads, writes) = match quality {
        Quality::Overfill => (Half::Full, Half::Decode(number)),
        Quality::Full => (Half::Full, Half::Full),
        Quality::Decode => (Half::Decode(number), Half::Decode(number)),
    };
    // The rows of the last position that was read, and the hash of all rows so far as each of the two models makes it.
    let (mut before, mut hashes) = (vec![NO_ROW; manifest.full.kv.layers], [reads, writes].map(Half::salt));
    let mut position = 0;
    let mut read = |half: Half, token: u32| {
        for (layer, before) in before.iter_mut().enumerate() {
            *before = row(half, layer, token, position, *before);
            hashes = hashes.map(|hash| mix(hash, *before));
        }
        position += 1;
        hashes
    };
    let mut hash = prompt.iter().map(|token| read(reads, *token)[0]).last().unwrap_or_default();
    let mut answer = Vec::new();
    loop {
        let Sampled { token, .. } = vocabulary.choose(hash, &mut sampler, prompt.len() + answer.len());
        answer.push(token);
        if let Some(reason) = stop.after(token, answer.len(), &vocabulary.eos) {
            return (answer, reason);
        }
        hash = read(writes, token)[1];
    }
}

fn row(half: Half, layer: usize, token: u32, position: usize, before: u64) -> u64 {
    [layer as u64, token.into(), position as u64, before].into_iter().fold(half.salt() + 1, mix)
}

/// One more number in a hash (the finaliser of SplitMix64): another hash, or another number, gives another.
fn mix(hash: u64, number: u64) -> u64 {
    let mut mixed = (hash.rotate_left(23) ^ number).wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use overfill_decode_node::Compute as Decodes;
    use overfill_prefill_node::{Compute as Reads, Piece};
    use overfill_tests::tiny;

    use super::*;

    const BLOCK: usize = 16;
    static MANIFEST: LazyLock<PairManifest> = LazyLock::new(|| tiny::pair(tiny::Kind::Identity, 1).open().manifest);

    fn stop(max_tokens: usize) -> StopConditions {
        StopConditions { max_tokens, stop_token_ids: Vec::new(), ignore_eos: true }
    }

    fn blocks(numbers: &[u32]) -> Vec<BlockId> {
        numbers.iter().copied().map(BlockId).collect()
    }

    /// The full model reads the prompt in chunks, its rows go over, `disturb` happens to the decode model's cache, and that writes.
    fn written(prompt: &[u32], sampling: &SamplingParams, tokens: usize, disturb: impl FnOnce(&mut Cache, &[BlockId])) -> Vec<u32> {
        let (mut full, mut decode) = (Model::new(Half::Full, &MANIFEST, 8, BLOCK), Model::new(Half::Decode(0), &MANIFEST, 8, BLOCK));
        let (there, here) = (blocks(&[6, 1, 3, 2]), blocks(&[0, 7, 2, 5]));
        let (mut sampler, mut answer) = (Sampler::new(sampling.clone(), prompt), Vec::new());
        for (i, tokens) in prompt.chunks(7).enumerate() {
            let chunk = Chunk { tokens, start: i * 7, blocks: &there, logits: true };
            Reads::forward(&mut full, &[chunk], &[tokens.len() - 1], &mut |layer, cached| {
                let piece = Piece { layer, start: i * 7, tokens: tokens.len() };
                let [k, v] = cached.bytes(0, &there, piece).unwrap();
                let rows = WireRows { format: MANIFEST.kv_formats.wire, start: piece.start, k: &k, v: &v };
                decode.write(cached.targets(0, layer)[0], &here, rows).unwrap();
            })
            .unwrap();
        }
        answer.push(full.tokens(vec![Row::Choose(&mut sampler, prompt.len())])[0].as_ref().unwrap().token);
        disturb(&mut decode.cache, &here);
        while answer.len() < tokens {
            let start = prompt.len() + answer.len() - 1;
            let chunk = Chunk { tokens: &answer[answer.len() - 1..], start, blocks: &here, logits: true };
            Decodes::forward(&mut decode, &[chunk]).unwrap();
            answer.push(decode.choose(vec![(&mut sampler, start + 1)])[0].as_ref().unwrap().token);
        }
        answer
    }

    #[test]
    fn what_both_models_write_is_what_is_known_beforehand() {
        for seed in 0..20 {
            let prompt = tiny::prompt(1 + 3 * seed as usize % 40, seed);
            for temperature in [0.0, 1.0] {
                let sampling = SamplingParams { temperature, seed, ..SamplingParams::greedy() };
                let (known, reason) = undisturbed((0, &MANIFEST), Quality::Overfill, &prompt, &sampling, &stop(20));
                assert_eq!(written(&prompt, &sampling, 20, |_, _| {}), known);
                assert_eq!((known.len(), reason), (20, FinishReason::Length));
            }
        }
    }

    #[test]
    fn each_wrong_row_gives_another_answer() {
        let (prompt, greedy) = (tiny::prompt(37, 5), SamplingParams::greedy());
        let known = undisturbed((0, &MANIFEST), Quality::Overfill, &prompt, &greedy, &stop(8)).0;
        let other = tiny::prompt(37, 6);
        for layer in 0..MANIFEST.decode.kv.layers {
            for position in 0..prompt.len() {
                let missing = written(&prompt, &greedy, 8, |cache, blocks| cache.set(layer, blocks, position, NO_ROW));
                assert_ne!(missing, known, "row {position} of layer {layer} is missing");
                let foreign = row(Half::Full, layer, other[position], position, NO_ROW);
                let foreign = written(&prompt, &greedy, 8, |cache, blocks| cache.set(layer, blocks, position, foreign));
                assert_ne!(foreign, known, "row {position} of layer {layer} is foreign");
                let of_decode = row(Half::Decode(0), layer, prompt[position], position, NO_ROW);
                let of_decode = written(&prompt, &greedy, 8, |cache, blocks| cache.set(layer, blocks, position, of_decode));
                assert_ne!(of_decode, known, "row {position} of layer {layer} is the decode model's");
                let misplaced = written(&prompt, &greedy, 8, |cache, blocks| {
                    let (here, next) = (cache.row(layer, blocks, position), cache.row(layer, blocks, (position + 1) % prompt.len()));
                    cache.set(layer, blocks, position, next);
                    cache.set(layer, blocks, (position + 1) % prompt.len(), here);
                });
                assert_ne!(misplaced, known, "rows {position} and the next of layer {layer} have changed places");
            }
        }
    }

    #[test]
    fn rows_out_of_shape_are_no_rows() {
        let mut cache = Cache::new(MANIFEST.decode.kv, MANIFEST.kv_formats.wire, 1, BLOCK);
        let table = blocks(&[0]);
        cache.set(0, &table, 0, 77);
        let [k, v] = (&cache).bytes(0, &table, Piece { layer: 0, start: 0, tokens: 1 }).unwrap();
        cache.write(0, &table, 5, &k, &v);
        assert_eq!(cache.row(0, &table, 5), 77);
        cache.write(0, &table, 5, &k, &k);
        assert_eq!(cache.row(0, &table, 5), NO_ROW);
        let shifted = [&k[1..], &k[..1]].concat();
        cache.write(0, &table, 6, &shifted, &v);
        assert_eq!(cache.row(0, &table, 6), NO_ROW);
    }

    #[test]
    fn each_quality_has_answers_of_its_own() {
        let (prompt, greedy) = (tiny::prompt(12, 1), SamplingParams::greedy());
        let [overfill, full, decode] = [Quality::Overfill, Quality::Full, Quality::Decode]
            .map(|quality| undisturbed((0, &MANIFEST), quality, &prompt, &greedy, &stop(8)).0);
        assert_eq!(overfill[0], full[0], "the first token is the full model's");
        assert!(overfill != full && full != decode && decode != overfill);
        assert_ne!(undisturbed((1, &MANIFEST), Quality::Overfill, &prompt, &greedy, &stop(8)).0, overfill, "the other pair's");
    }
}
