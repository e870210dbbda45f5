//! Which prompts are read in the next step, and how much of each.

/// Shares `budget` tokens among prompts that have `remaining` tokens to read, in order of arrival.
///
/// Everyone gets an equal share; what a short prompt leaves goes to the others, so a short prompt behind a long one is
/// read at once. The first in the queue gets at least one token, so every step gets somewhere.
pub(crate) fn share(remaining: &[usize], budget: usize) -> Vec<usize> {
    let mut given = vec![0; remaining.len()];
    let mut left = budget.max(1);
    loop {
        let hungry = remaining.iter().zip(&given).filter(|(r, g)| r > g).count();
        if hungry == 0 || left == 0 {
            return given;
        }
        // With fewer tokens than prompts the first ones get one each.
        let each = (left / hungry).max(1);
        for (given, remaining) in given.iter_mut().zip(remaining) {
            let more = each.min(remaining - *given).min(left);
            *given += more;
            left -= more;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_prompts_do_not_wait_behind_long_ones() {
        for (remaining, budget, want) in [
            (&[1500][..], 256, &[256][..]),
            (&[1500, 10], 256, &[246, 10]),
            (&[1500, 1500, 10], 100, &[45, 45, 10]),
            (&[5, 5], 256, &[5, 5]),
            (&[9, 9, 9], 2, &[1, 1, 0]),
            (&[3], 0, &[1]),
            (&[], 10, &[]),
        ] {
            assert_eq!(share(remaining, budget), want, "{remaining:?} of {budget}");
        }
    }

    #[test]
    fn the_budget_is_used_and_kept() {
        for budget in 1..40 {
            for remaining in [vec![1, 7, 30], vec![20, 20], vec![3; 9], vec![0, 5]] {
                let given = share(&remaining, budget);
                assert!(given.iter().zip(&remaining).all(|(g, r)| g <= r));
                assert_eq!(given.iter().sum::<usize>(), budget.min(remaining.iter().sum()), "{remaining:?} of {budget}");
            }
        }
    }
}
