/* Titles: how a title of a catalog is read: "Third Man, The (1949)" is The Third Man, of 1949. */

const YEAR = /\s*\((\d{4})\)\s*$/;
const ARTICLE = /^(.+), (The|A|An|Le|La|Les|L'|Il|Lo|El|Los|Las|Der|Die|Das|Den|Det)$/;

/** A title's name and year; a year that is not in the title is an empty text. */
export function named(title) {
  const year = YEAR.exec(title)?.[1] ?? "";
  const bare = title.replace(YEAR, "").trim() || title;
  const [, name, article] = ARTICLE.exec(bare) ?? [];
  if (!name) return { name: bare, year };
  return { name: `${article}${article.endsWith("'") ? "" : " "}${name}`, year };
}

/** What stands below a title: its year and the first of its attributes' values, numbers by name. */
export function meta({ title, attributes }, most = 3) {
  const told = (column, value) =>
    /^[\d.,-]+$/.test(value) && !/^(19|20)\d\d$/.test(value) ? `${column} ${value}` : value;
  const values = Object.entries(attributes ?? {}).flatMap(([column, cells]) =>
    cells.filter((v) => v && v !== "unknown").map((v) => told(column, v)),
  );
  return [...new Set([named(title).year, ...values].filter(Boolean))].slice(0, most);
}

/** Items as they are shown: one without a title is called by its id. */
export const titled = (items) =>
  items.map((item) => ({ ...item, title: item.title || item.item_id }));
