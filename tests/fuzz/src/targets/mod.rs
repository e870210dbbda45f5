//! What reads inputs from outside, a file for each way in.

mod doors;
mod files;
mod frames;

use crate::Target;

/// All of them.
pub fn all() -> Vec<Box<dyn Target>> {
    let mut all = doors::all();
    all.extend(files::all());
    all.push(Box::new(frames::Frames::new()));
    all
}
