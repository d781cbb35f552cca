/// A moment in the proleptic Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Date {
    pub second: u8,
    pub minute: u8,
    pub hour: u8,
    /// 1 is Sunday.
    pub weekday: u8,
    pub day: u8,
    pub month: u8,
    pub year: i64,
}

const DAY_SECONDS: i64 = 86_400;
/// Days in 400 years, after which the calendar repeats.
const ERA_DAYS: i64 = 146_097;
/// From 0000-03-01 to 1970-01-01: eras begin on a 1 March, so that leap days come last.
const EPOCH_DAYS: i64 = 719_468;
/// The first and last second that a two-digit century can say: years 0 to 9999.
const RANGE: std::ops::RangeInclusive<i64> = -62_167_219_200..=253_402_300_799;

impl Date {
    /// Seconds beyond the years 0 to 9999 count as the nearest in them.
    pub fn from_unix(seconds: i64) -> Self {
        let seconds = seconds.clamp(*RANGE.start(), *RANGE.end());
        let (days, rest) = (seconds.div_euclid(DAY_SECONDS), seconds.rem_euclid(DAY_SECONDS));
        let since = days + EPOCH_DAYS;
        let (era, day_of_era) = (since.div_euclid(ERA_DAYS), since.rem_euclid(ERA_DAYS));
        // Of the leap days, take off every 4th year's, put back every 100th's, take off the 400th's.
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        // Months from March on have 31 30 31 30 31 days, again and again.
        let from_march = (5 * day_of_year + 2) / 153;
        let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
        Self {
            second: (rest % 60) as u8,
            minute: (rest / 60 % 60) as u8,
            hour: (rest / 3600) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            day: (day_of_year - (153 * from_march + 2) / 5 + 1) as u8,
            month: month as u8,
            year: 400 * era + year_of_era + i64::from(month <= 2),
        }
    }

    /// `None` for a date that does not exist. The weekday does not matter.
    pub fn to_unix(self) -> Option<i64> {
        let plausible = (1..=12).contains(&self.month)
            && (1..=31).contains(&self.day)
            && self.hour < 24
            && self.minute < 60
            && self.second < 60
            && (0..10_000).contains(&self.year);
        if !plausible {
            return None;
        }
        let (month, day) = (i64::from(self.month), i64::from(self.day));
        let year = self.year - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let from_march = (month + 9) % 12;
        let day_of_year = (153 * from_march + 2) / 5 + day - 1;
        let days = era * ERA_DAYS + 365 * year_of_era + year_of_era / 4 - year_of_era / 100 + day_of_year - EPOCH_DAYS;
        let time = i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second);
        let seconds = days * DAY_SECONDS + time;
        // The 31st of a shorter month comes back as another day.
        (Self::from_unix(seconds).day == self.day).then_some(seconds)
    }
}
