//! The guides of one pair: compiled apart, kept by what they say.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use overfill_types::{Code, Fingerprint, Guide, PairManifest, ServiceError};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::sync::{OnceCell, oneshot};

use crate::apart::Apart;
use crate::args::GuideArgs;
use crate::compiler::{Compiler, Grammar, Tokens, refused};
use crate::matcher::Matcher;
use crate::worker::{STACK, Verdict};

/// Memory of the guides that are kept, in bytes: some hundreds of usual size.
const KEPT: u64 = 64 << 20;
/// What one takes at least, refusals too.
const LEAST: u64 = 4 << 10;

/// Compiles guides for one pair.
pub struct Guides {
    /// Where its tokens have no bytes that we know of, why: then the pair is served without guides.
    known: Result<Known, ServiceError>,
}

struct Known {
    compiler: Arc<Compiler>,
    apart: Apart,
    kept: Cache<Grammar, Kept, Bytes>,
}

/// What is known of a guide. Clones share it.
#[derive(Clone)]
struct Kept {
    verdict: Verdict,
    /// Where an answer has followed it here: how it begins.
    compiled: Arc<OnceCell<Matcher>>,
}

#[derive(Clone)]
struct Bytes;

impl Weighter<Grammar, Kept> for Bytes {
    fn weight(&self, grammar: &Grammar, kept: &Kept) -> u64 {
        let (Grammar::JsonSchema(text) | Grammar::Regex(text) | Grammar::Lark(text)) = grammar;
        let bytes = if let Verdict::Good { bytes } = kept.verdict { bytes } else { 0 };
        LEAST + text.len() as u64 + bytes
    }
}

/// Those that are open in this process: where it runs several servers, they compile a guide once.
static OPEN: Mutex<Vec<(Opened, Weak<Guides>)>> = Mutex::new(Vec::new());

#[derive(PartialEq)]
struct Opened {
    pair: Fingerprint,
    dir: PathBuf,
    args: String,
}

impl Guides {
    /// Reads the tokens of the pair in `dir`, whose manifest is `manifest`. Takes some tenths of a second.
    pub fn open(dir: &Path, manifest: &PairManifest, args: &GuideArgs) -> Arc<Self> {
        let opened = Opened { pair: manifest.fingerprint.clone(), dir: dir.to_owned(), args: format!("{args:?}") };
        let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|(_, guides)| guides.strong_count() > 0);
        if let Some(guides) = open.iter().find(|(other, _)| *other == opened).and_then(|(_, guides)| guides.upgrade()) {
            return guides;
        }
        let tokens = Tokens::of(dir, manifest);
        let known = Compiler::open(&tokens).map(|compiler| Known {
            compiler: Arc::new(compiler),
            apart: Apart::new(args, tokens),
            kept: Cache::with_weighter((KEPT / LEAST) as usize, KEPT, Bytes),
        });
        let guides = Arc::new(Self { known });
        open.push((opened, Arc::downgrade(&guides)));
        guides
    }

    /// Whether a guide can be followed, for whoever does not follow it.
    ///
    /// # Errors
    /// [`Code::InvalidArgument`] where it is malformed, matches nothing, or costs too much (it is said what),
    /// [`Code::Unimplemented`] where the pair's tokens have no bytes that we know of, [`Code::Unavailable`] where it
    /// cannot be said now.
    pub async fn check(&self, guide: &Guide) -> Result<(), ServiceError> {
        match grammar(guide) {
            None => Ok(()),
            Some(grammar) => self.known()?.judged(&grammar).await.map(|_| ()),
        }
    }

    /// A matcher at the beginning of an answer.
    ///
    /// # Errors
    /// As [`Guides::check`].
    pub async fn matcher(&self, guide: &Guide) -> Result<Matcher, ServiceError> {
        match (guide, grammar(guide)) {
            (Guide::Tokens(ids), _) => Ok(Matcher::forcing(ids.clone())),
            (_, Some(grammar)) => {
                let known = self.known()?;
                let kept = known.judged(&grammar).await?;
                kept.compiled.get_or_try_init(|| known.compile(grammar)).await.map(Matcher::begin_again)
            }
            (_, None) => Err(ServiceError::new(Code::Internal, "a guide of this kind cannot be compiled")),
        }
    }

    /// The bytes that a token stands for; those of a special token are its name. Empty where they are not known.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.known.as_ref().map_or(&[], |known| known.compiler.token_bytes(id))
    }

    fn known(&self) -> Result<&Known, ServiceError> {
        self.known.as_ref().map_err(ServiceError::clone)
    }
}

impl Known {
    /// A guide that can be followed. Those who ask for the same at once wait for one.
    async fn judged(&self, grammar: &Grammar) -> Result<Kept, ServiceError> {
        let judge = async { Ok::<_, ServiceError>(Kept { verdict: self.apart.compile(grammar).await?, compiled: Arc::default() }) };
        let kept = self.kept.get_or_insert_async(grammar, judge).await?;
        match &kept.verdict {
            Verdict::Good { .. } => Ok(kept),
            Verdict::Refused(why) => Err(ServiceError::new(Code::InvalidArgument, why)),
            Verdict::Costs(why) => Err(refused(grammar, why)),
        }
    }

    /// Compiles here what was compiled apart: with twice the stack, since it may be another build that does so.
    async fn compile(&self, grammar: Grammar) -> Result<Matcher, ServiceError> {
        let (compiler, (tell, told)) = (self.compiler.clone(), oneshot::channel());
        let compile = move || {
            let _ = tell.send(compiler.compile(&grammar));
        };
        let failed =
            |why: &dyn std::fmt::Display| ServiceError::no_room(Code::Unavailable, format!("the guide cannot be compiled here now: {why}"));
        std::thread::Builder::new().name("guide".into()).stack_size(2 * STACK).spawn(compile).map_err(|e| failed(&e))?;
        told.await.unwrap_or_else(|_| Err(failed(&"compiling it panicked")))
    }
}

/// What of a guide has to be compiled, if anything.
fn grammar(guide: &Guide) -> Option<Grammar> {
    match guide {
        Guide::Tokens(_) => None,
        Guide::JsonSchema(schema) => Some(Grammar::JsonSchema(schema.clone())),
        Guide::Regex(regex) => Some(Grammar::Regex(regex.clone())),
        Guide::Grammar(grammar) => Some(Grammar::Lark(grammar.clone())),
    }
}
